"""A data set's own faults: images that cannot be read or say nothing, copies within and across splits, classes that are too small."""
import hashlib
import io
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from .core.errors import UserError
from .core.progress import with_progress
from .core.storage import output_folder, write_json
from .data.class_lists import SPLITS, list_of
from .data.images import check_resize, open_image, square, upright_rgb
from .data.order import KNOWN, first_equal, image_fingerprint, pixel_hashes
from .data.sources import open_source
from .fewshot.embed import features
from .models.create import create_backbone

__all__ = ['DataCheck', 'Finding', 'check_data']


NETWORK,SIDE = 'convnet4.grdd_cifarfs',32 # whose features tell near duplicates, and the side of its images in pixels
NEAR = 0.985 # cosine of two images' centred features from which on they are near duplicates
FLAT = 2 # standard deviation (0-255) of each channel below which an image is constant
TABLES = 12 # tables of random hyperplanes: all of them miss a pair with the cosine `NEAR` with a probability of about 1 in 1,000
BLOCK = 1024 # images at a time
SHOWN = 5 # images that the text names for each finding
# mean and standard deviation of the channels of the images that the lists split
STATS = {**dict.fromkeys(('cifar_fs', 'fc100'), ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))),
         **dict.fromkeys(('mini_imagenet', 'mini_imagenet_vinyals', 'tiered_imagenet'), ((0.47, 0.45, 0.40), (0.28, 0.27, 0.29)))}


@dataclass(frozen=True)
class Finding:
    """One kind of fault: a sentence, and whether it spoils what is measured

    `images` holds the split and the file of each image; for copies it also holds the split and the file of the image that is copied.
    """
    kind: str
    serious: bool
    sentence: str
    images: list = field(default_factory=list)
    def __str__(self):
        lines = [f'{"!" if self.serious else "-"} {self.sentence}']
        lines += ['    ' + (f'{i[1]} ({i[0]}) is {i[3]} ({i[2]})' if len(i) == 4 else f'{i[1]} ({i[0]})') for i in self.images[:SHOWN]]
        if len(self.images) > SHOWN: lines.append(f'    and {len(self.images) - SHOWN} more')
        return '\n'.join(lines)


@dataclass(frozen=True)
class DataCheck:
    "What `check_data` found: facts about the data set, and the `findings`; `print` it or write it by `to_json`"
    name: str
    class_list: str|None # the list of the package that the splits follow
    known_as: str|None # the published data set whose very images these are
    image_fingerprint: str
    n_images: dict
    n_classes: dict
    images_per_class: dict # (least, most) of each split
    sizes: dict # images of each width x height, the most frequent ones first
    modes: dict
    mean: list
    std: list
    findings: list
    kept: dict = field(repr=False) # rows of each split without those that `fix` leaves out
    @property
    def ok(self): return not any(f.serious for f in self.findings)
    def __str__(self):
        same = f', the very images of {self.known_as}' if self.known_as else ''
        lines = [f'{self.name}: ' + (f'the split of {self.class_list}' if self.class_list else 'a split of its own') + same]
        for s in SPLITS:
            least,most = self.images_per_class[s]
            each = f'{least} each' if least == most else f'{least} to {most} each'
            lines.append(f'{s:>6}: {self.n_images[s]:,} images in {self.n_classes[s]} classes, {each}')
        for what,counts in (('sizes', self.sizes), ('modes', self.modes)):
            some = list(counts.items())[:SHOWN]
            lines.append(f'{what:>6}: ' + ', '.join(f'{k} ({n:,})' for k,n in some) + (', ...' if len(counts) > SHOWN else ''))
        lines.append(f'  mean: {", ".join(f"{v:.3f}" for v in self.mean)}, standard deviation {", ".join(f"{v:.3f}" for v in self.std)}')
        lines.append(f'image fingerprint: {self.image_fingerprint}')
        return '\n'.join([*lines, *map(str, self.findings), 'nothing serious was found' if self.ok else
                          'what is marked with ! spoils what is measured: --fix leaves such images out'])
    def to_json(self, path):
        "Write everything to a JSON file"
        write_json(path, dict(ok=self.ok) | {k:v for k,v in asdict(self).items() if k != 'kept'})
    def fix(self, folder):
        """Write train.csv, val.csv and test.csv of the images without serious faults to a folder, as a list for `split`, and return it

        Of images that are in two splits, the novel classes keep theirs, then the validation classes, so that what is measured stays
        comparable. Of copies in one split, the first one is kept. No image is changed.
        """
        with output_folder(folder, '--fix') as out:
            for s,df in self.kept.items():
                (out/f'{s}.csv').write_bytes(df[['filename', 'label']].to_csv(index=False).encode(errors='surrogateescape'))
        return out


def check_data(
    data=None, # raw data set, as `few_shot_data` takes it
    px:int=32, # side of the images in pixels, as they will be used
    way:int=5, # classes of an episode
    shot:int=5, # support images of a class
    query:int=15, # query images of a class
    seed:int=0, # seed that splits a folder of class folders
    split=None, # list of classes or images in place of the data's own splits
    resize:str='fit', # how images become squares (`square`)
    interpolation:str='bicubic', # how images are resized
) -> DataCheck:
    """Read every image of a data set once and say what is wrong with it

    Near duplicates are images whose features point almost the same way. They are found by random hyperplanes, so that the time grows with
    the number of images and not with its square. UserError if there is no data set.
    """
    check_resize(resize, interpolation, px)
    source = open_source(data, seed, split)
    found = _read_all(source, px, f'{resize} {interpolation}')
    rows,findings = found.rows,[]
    def add(kind, serious, sentence, which, other=None):
        names = rows[['split', 'filename']].to_numpy()
        images = [list(names[i]) for i in which] if other is None else [[*names[i], *names[j]] for i,j in zip(which, other)]
        if len(images): findings.append(Finding(kind, serious, sentence.format(n=f'{len(images):,}'), images))
        return set(which)
    left_out = add('unreadable', True, '{n} images cannot be read', np.flatnonzero(found.bad).tolist())
    left_out |= add('constant', True, '{n} images have one colour', np.flatnonzero(found.flat).tolist())
    add('small', False, f'{{n}} images are smaller than {px} px and are enlarged', np.flatnonzero(found.small).tolist())
    split_code = rows.split.map({s:i for i,s in enumerate(SPLITS)}).to_numpy()
    good = np.flatnonzero(~found.bad & ~found.flat)
    exact = {(int(good[i]), int(good[j])) for i,j in _copies(found.native[good])}
    near = {(int(good[i]), int(good[j])) for i,j in near_duplicates(found.h[good])} - exact
    label = rows.label.to_numpy()
    for kind,pairs in (('copies', exact), ('near copies', near)):
        across = sorted((i, j) for i,j in pairs if split_code[i] != split_code[j])
        other = sorted((i, j) for i,j in pairs if split_code[i] == split_code[j] and label[i] != label[j])
        same = sorted((i, j) for i,j in pairs if label[i] == label[j] and split_code[i] == split_code[j])
        for where,mine,serious in (('across splits', across, kind == 'copies'), ('of another class of the split', other, kind == 'copies'),
                                   ('within a class', same, False)):
            add(f'{kind} {where}', serious, f'{{n}} {kind} {where}', [j for _,j in mine], [i for i,_ in mine])
        if kind == 'copies': left_out |= {i for i,_ in across} | {j for _,j in other} | {j for _,j in same}
    kept = {s:df.drop(index=[i for i in left_out if i in df.index]) for s,df in ((s, rows[rows.split == s]) for s in SPLITS)}
    for s in SPLITS:
        sizes = rows[(rows.split == s) & ~found.bad].label.value_counts()
        needs = dict(train=shot + 1, val=shot + query, test=shot + query)[s]
        few = sizes[sizes < needs]
        if len(sizes) < way:
            findings.append(Finding('few classes', True, f'{s} has {len(sizes)} classes: episodes need {way}'))
        if len(few):
            sentence = (f'{len(few)} classes of {s} have fewer than {needs} images: '
                        f'episodes need {shot} for support and {needs - shot} for queries')
            findings.append(Finding('small classes', True, sentence, [[s, c] for c in few.index]))
    name = list_of({s:set(df.label) for s,df in source.frames.items()})
    mean,std = found.mean,found.std
    if name in STATS:
        want = np.array(STATS[name][0])
        colours = f'the mean of the base images is {np.round(mean, 3).tolist()}, that of {name} about {want.tolist()}'
        if np.abs(want[::-1] - mean).sum() + .02 < np.abs(want - mean).sum():
            findings.append(Finding('channels', True, f'red and blue look swapped: {colours}'))
        elif np.abs(want - mean).max() > .06: findings.append(Finding('colours', False, f'the colours are others than usual: {colours}'))
    fingerprint = image_fingerprint({s:found.hashes[rows.split == s] for s in SPLITS},
                                    {s:pd.factorize(rows.label[rows.split == s], sort=True)[0] for s in SPLITS})
    return DataCheck(
        name=source.name, class_list=name, known_as=Path(KNOWN[fingerprint]).stem.removesuffix('_order') if fingerprint in KNOWN else None,
        image_fingerprint=fingerprint, n_images={s:len(df) for s,df in source.frames.items()},
        n_classes={s:df.label.nunique() for s,df in source.frames.items()},
        images_per_class={s:(int((n := df.label.value_counts()).min()), int(n.max())) for s,df in source.frames.items()},
        sizes=dict(found.sizes.most_common()), modes=dict(found.modes.most_common()), mean=np.round(mean, 4).tolist(),
        std=np.round(std, 4).tolist(), findings=findings, kept=kept)


# ---- reading ----------------------------------------------------------------------------------------------------------

@dataclass
class _Images:
    "What is known of each image, by row"
    rows: pd.DataFrame # split, filename, label, path
    bad: np.ndarray # images that cannot be read
    flat: np.ndarray # images of one colour
    small: np.ndarray # images with a side below the side that is used
    native: np.ndarray # hash (16 bytes) of the pixels before they are resized
    hashes: np.ndarray # hash (16 bytes) of the pixels that are used
    h: np.ndarray # features (N, D)
    sizes: Counter
    modes: Counter
    mean: np.ndarray
    std: np.ndarray

def _read_all(source, px, how):
    "The `_Images` of a source, read block by block"
    rows = pd.concat([df.assign(split=s) for s,df in source.frames.items()], ignore_index=True)
    n = len(rows)
    net = create_backbone(NETWORK, 0, SIDE).eval()
    shift,scale = (torch.tensor(net.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ('mean', 'std'))
    found = _Images(rows, *(np.zeros(n, bool) for _ in range(3)), *(np.zeros((n, 16), np.uint8) for _ in range(2)),
                    np.zeros((n, net.num_features), np.float16), Counter(), Counter(), np.zeros(3), np.zeros(3))
    train = (rows.split == 'train').to_numpy()
    sums,squares,n_train = np.zeros(3),np.zeros(3),0
    paths = rows.path.to_numpy()
    with ThreadPoolExecutor(os.cpu_count()) as pool, torch.inference_mode():
        for at in with_progress(range(0, n, BLOCK)):
            mine = range(at, min(at + BLOCK, n))
            read = list(pool.map(lambda i: _read(source, paths[i], px, how), mine))
            for i,one in zip(mine, read):
                if one is None: found.bad[i] = True
                else:
                    found.sizes[f'{one.size[0]} x {one.size[1]}'] += 1
                    found.modes[one.mode] += 1
                    found.small[i] = min(one.size) < px
                    found.flat[i] = one.image.reshape(-1, 3).std(0).max() < FLAT
                    found.native[i] = np.frombuffer(one.native, np.uint8)
            good = [i for i in mine if not found.bad[i]]
            if not good: continue
            images = np.stack([one.image for one in read if one])
            found.hashes[good] = pixel_hashes(images)
            x = torch.from_numpy(np.stack([one.thumb for one in read if one])).movedim(-1, 1)/255
            found.h[good] = features(net, (x - shift)/scale).numpy()
            base = images[[train[i] for i in good]]/255
            sums,squares,n_train = sums + base.sum((0, 1, 2)),squares + (base**2).sum((0, 1, 2)),n_train + len(base)*px*px
    found.mean = sums/max(n_train, 1)
    found.std = np.sqrt((squares/max(n_train, 1) - found.mean**2).clip(0))
    return found

@dataclass
class _One:
    "One image: its pixels as they are used and at the network's side, and what it was before"
    image: np.ndarray
    thumb: np.ndarray
    native: bytes
    size: tuple
    mode: str

def _read(source, path, px, how):
    try:
        im = open_image(io.BytesIO(source.read(path)), allow_large=True)
        mode = im.mode
        im = upright_rgb(im)
        native = hashlib.blake2b(repr(im.size).encode() + im.tobytes(), digest_size=16).digest()
        thumb = np.asarray(im.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        return _One(square(im, px, *how.split()), thumb, native, im.size, mode)
    except UserError: raise
    except Exception: return None # any error of a damaged file


# ---- copies -----------------------------------------------------------------------------------------------------------

def _copies(hashes):
    "Pairs (earlier, later) of equal rows of uint8 (N, 16): each row that is a copy, with the first row that is equal to it"
    if not len(hashes): return []
    first = first_equal(hashes)
    return [(int(first[i]), int(i)) for i in np.flatnonzero(first != np.arange(len(first)))]

def near_duplicates(h, least=NEAR, seed=0):
    """Pairs (earlier, later) of rows of the features h (N, D) whose cosine after centring is at least `least`

    Only rows that lie on the same sides of all random hyperplanes of a table are compared, in `TABLES` tables of about log2(N) hyperplanes.
    Rows that lie there with more than 64 others are compared with the next 64.
    """
    n = len(h)
    if n < 2: return []
    h = torch.from_numpy(np.asarray(h, np.float32))
    h = torch.nn.functional.normalize(h - h.mean(0), dim=1)
    bits = max(1, min(20, int(np.log2(n)) - 2))
    planes = torch.randn(TABLES, h.shape[1], bits, generator=torch.Generator().manual_seed(seed))
    power = 2**torch.arange(bits)
    pairs = set()
    for plane in planes:
        key = ((h @ plane > 0)*power).sum(1)
        rows = key.argsort(stable=True)
        for step in range(1, 65):
            a,b = rows[:-step],rows[step:]
            same = key[a] == key[b]
            if not same.any(): break
            a,b = a[same],b[same]
            for part in range(0, len(a), 2**16):
                i,j = a[part:part+2**16],b[part:part+2**16]
                close = (h[i]*h[j]).sum(1) >= least
                pairs |= set(zip(torch.minimum(i, j)[close].tolist(), torch.maximum(i, j)[close].tolist()))
    return sorted(pairs)
