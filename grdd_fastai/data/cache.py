"""The packed images: decoded once into a memory-mapped uint8 array, in an order that does not depend on the layout."""
import hashlib
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import UnidentifiedImageError

from ..core.errors import UserError
from ..core.progress import with_progress
from ..core.storage import MAX_SIDE, default_cache, locked, new_memmap, part_name, read_json, sweep, user_path
from .array_files import read_npy
from .class_lists import SPLITS
from .demo import DemoSource
from .images import check_resize, crop_config, decode
from .order import find_duplicates, image_fingerprint, pixel_hashes, row_order
from .sources import open_source

__all__ = ['Split', 'FewShotData', 'few_shot_data']


BLOCK = 1024 # images decoded at a time
FORMAT = 4 # format of the packed folder; a folder of an earlier format is packed anew


def _check(meta): return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()

def _begin(f):
    "The byte of an open .npy file at which its numbers begin"
    np.lib.format.read_magic(f)
    np.lib.format.read_array_header_1_0(f)
    return f.tell()

def _fingerprint(folder):
    "SHA-256 of the packed images and CSVs, which are read block by block"
    h = hashlib.sha256()
    for s in SPLITS:
        with open(folder/f'{s}.npy', 'rb') as f:
            f.seek(_begin(f))
            while block := f.read(2**22): h.update(block)
    for s in SPLITS: h.update((folder/f'{s}.csv').read_bytes())
    return h.hexdigest()


class Split:
    "One split: `images` uint8 (N, px, px, 3), class codes `y` int64 (N), class names `vocab`, and `df` with columns filename and label"
    def __init__(self, name, images, df, crop=None):
        self.name,self.images,self.df = name,images,df
        self.crop = crop or {} # how the images became squares (`crop_config`)
        self.vocab = sorted(set(df.label))
        codes = {c:i for i,c in enumerate(self.vocab)}
        self.y = np.array([codes[c] for c in df.label], np.int64)
    def __len__(self): return len(self.y)
    def __repr__(self): return f'Split({self.name}: {len(self)} images, {len(self.vocab)} classes, {self.images.shape[1]} px)'


class FewShotData:
    """The splits `train`, `val` and `test` of a data set and the `stats` (mean, std) of its base classes

    `fingerprint` is the SHA-256 of the packed images, their file names and labels, in their order, and `image_fingerprint` that of the
    images and classes alone, whatever they are called. `resize` says how the images got their size.
    """
    def __init__(self, folder):
        meta = read_json(folder/'meta.json')
        if meta.pop('check') != _check(meta): raise ValueError('the checksum of its meta.json is wrong')
        self.name,self.px,self.fingerprint,self.image_fingerprint,self.stats,self.resize = (
            meta[k] for k in ('name','px','fingerprint','image_fingerprint','stats','resize'))
        self.duplicates = meta.get('shared', []) # images that are in two splits: (split, filename, earlier split, filename)
        self.folder = folder
        pair = np.array(self.stats, float)
        if type(self.px) is not int or pair.shape != (2, 3) or not np.isfinite(pair).all() or pair[1].min() <= 0:
            raise ValueError('its meta.json is no data set\'s')
        for s in SPLITS:
            if not all((folder/f'{s}.{kind}').is_file() for kind in ('csv', 'npy')):
                raise ValueError(f'{s}.csv or {s}.npy is no regular file')
            df = pd.read_csv(folder/f'{s}.csv', dtype=object, keep_default_na=False, encoding_errors='surrogateescape')
            images = np.load(folder/f'{s}.npy', mmap_mode='r')
            if len(images) != len(df): raise ValueError(f'{s}.csv has {len(df)} rows for {len(images)} images')
            setattr(self, s, Split(s, images, df, crop_config(*self.resize.split(), self.px)))
        if _fingerprint(folder) != self.fingerprint: raise ValueError('its checksum is wrong')
    def __repr__(self): return f'FewShotData({self.name}: {self.train}, {self.val}, {self.test})'


def few_shot_data(
    # raw data set in any layout of data/README.md; a DataFrame with the columns filename, label and split; a torch or Hugging Face data
    # set; a dict of either by split; None: fetch CIFAR-FS; 'demo': draw the embedded data set
    data:str|Path|pd.DataFrame|dict|object|None=None,
    px:int=32, # side of the packed images in pixels, from 1 to 1024
    cache:str|Path|None=None, # folder for the packed images; None: `default_cache()`
    seed:int=0, # seed that splits a folder of class folders and draws the demo
    allow_large:bool=False, # also decode images of 89 to 179 megapixels
    # which classes or images are base, validation and novel: a list of the package, such as fc100, or a path of lists (`read_split`);
    # None: as the data itself says
    split:str|Path|None=None,
    resize:str='fit', # how an image becomes a square: fit, squash or crop<side> such as crop92 (`square`)
    interpolation:str='bicubic', # bicubic, bilinear, lanczos, box, hamming or nearest
) -> FewShotData:
    """Pack `data` if it is new or has changed (CSVs or images), and return it as a `FewShotData`

    Prints a warning if two splits seem to share classes or images. UserError if the data cannot be read or the cache cannot be written.
    """
    if not isinstance(px, int | np.integer) or isinstance(px, bool) or not 1 <= px <= MAX_SIDE:
        raise UserError(f'images of {px!r} px are asked for: px must be from 1 to {MAX_SIDE}')
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise UserError(f'the seed is {seed!r}: give a whole number, 0 or more')
    check_resize(resize, interpolation, px)
    demo = isinstance(data, str) and data == 'demo' and not Path('demo').exists()
    if demo and split is not None: raise UserError('the embedded data set has splits of its own: leave split out')
    source = DemoSource(seed) if demo else open_source(data, seed, split)
    try:
        cache = user_path(cache or default_cache(), '--cache').resolve()
        stamp = f'{FORMAT} {source.stamp()}'
    except (OSError, RuntimeError) as e:
        raise UserError(f'the cache folder {cache} cannot be used ({getattr(e, "strerror", None) or e}): give --cache another') from None
    if cache.is_relative_to(Path(source.path).resolve()):
        raise UserError(f'the cache folder {cache} lies inside the data {source.path}: give --cache another')
    px = int(px)
    how = f'{resize} {interpolation}'
    key = ' '.join([source.key, str(px), *([] if how == 'fit bicubic' else [how])])
    key = hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()[:12]
    folder = cache/f'{source.name[:60]}-{px}-{key}'
    try: cache.mkdir(parents=True, exist_ok=True)
    except OSError as e: raise UserError(f'the cache folder {cache} cannot be written ({e.strerror}): give --cache another') from None
    with locked(cache/f'.{folder.name}.lock'): # one process packs while the others wait
        if _stamp(folder) == stamp:
            try: return with_warning(FewShotData(folder))
            except Exception as e: # a damaged file can raise any error
                print(f'{folder} is damaged ({type(e).__name__}: {e}) and packed anew', file=sys.stderr)
        _pack(source, px, stamp, folder, allow_large, how)
        return with_warning(FewShotData(folder))


def _stamp(folder):
    try: return read_json(folder/'meta.json')['stamp']
    except (UserError, KeyError): return None

def with_warning(data):
    "Print a warning if two splits of `data` share images, and return `data`"
    if data.duplicates:
        examples = '; '.join(f'{a} ({s}) is {b} ({t})' for s,a,t,b in data.duplicates[:3])
        if len(data.duplicates) > 3: examples += ' ...'
        print(f'warning: {data.name}: {len(data.duplicates)} images are in two splits, so that one of them does not measure what is new: '
              f'{examples}', file=sys.stderr)
    return data

def _pack(source, px, stamp, folder, allow_large, how):
    "Decode `source` into a new folder beside `folder`, then replace `folder` by it"
    sweep(folder.parent, folder.name)
    tmp = None
    try:
        tmp = part_name(folder)
        tmp.mkdir()
        histogram = np.zeros((3, 256), np.int64)
        n = {s:len(df) for s,df in source.frames.items()}
        print(f'packing {sum(n.values())} images of {source.name} at {px} px', file=sys.stderr)
        hashes = {s:np.empty((n[s], 16), np.uint8) for s in n}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            blocks = [(s, at) for s in n for at in range(0, n[s], BLOCK)]
            for s in n: new_memmap(tmp/f'{s}.npy', (n[s], px, px, 3), np.uint8)
            for s,at in with_progress(blocks):
                rows = range(at, min(at+BLOCK, n[s]))
                block = np.stack(list(pool.map(lambda row: _decode_row(source, s, row, px, allow_large, how), rows)))  # noqa: B023
                _write(tmp/f'{s}.npy', at, block)
                hashes[s][at:at+len(block)] = pixel_hashes(block)
                if s == 'train': histogram += [np.bincount(block[..., c].ravel(), minlength=256) for c in range(3)]
        codes = {s:pd.factorize(df.label, sort=True)[0] for s,df in source.frames.items()}
        images = image_fingerprint(hashes, codes)
        frames = source.frames
        if not getattr(source, 'ordered', False):
            order = row_order(hashes, codes, images)
            for s in order: _reorder(tmp/f'{s}.npy', order[s])
            frames = {s:df.iloc[order[s]] for s,df in frames.items()}
            hashes = {s:hashes[s][order[s]] for s in order}
        for s,df in frames.items():
            (tmp/f'{s}.csv').write_bytes(df[['filename','label']].to_csv(index=False).encode(errors='surrogateescape'))
        meta = dict(name=source.name, px=px, source=str(source.path), stamp=stamp, fingerprint=_fingerprint(tmp), image_fingerprint=images,
                    resize=how, stats=_stats(histogram), shared=find_duplicates(hashes, {s:df.filename for s,df in frames.items()}))
        (tmp/'meta.json').write_text(json.dumps(meta | dict(check=_check(meta))))
        shutil.rmtree(folder, ignore_errors=True)
        tmp.rename(folder)
    except OSError as e: raise UserError(f'the cache {folder} cannot be written ({e.strerror}): give --cache another folder') from None
    finally:
        if tmp: shutil.rmtree(tmp, ignore_errors=True)

def _write(path, at, block):
    "Write rows, from row `at` on, into a .npy file; a memory map would keep them in memory"
    with open(path, 'r+b') as f:
        f.seek(_begin(f) + at*block[0].nbytes)
        f.write(block)

def _reorder(path, order):
    "Put the rows of a .npy file into another order"
    if (order == np.arange(len(order))).all(): return
    before = path.with_suffix('.before')
    path.rename(before)
    with open(before, 'rb') as f:
        images = read_npy(f, before)
        new_memmap(path, images.shape, images.dtype)
        for at in range(0, len(order), BLOCK): _write(path, at, np.stack([images[i] for i in order[at:at+BLOCK]]))
    before.unlink()


def _stats(histogram):
    "Mean and standard deviation of each channel, scaled to [0, 1], from the counts (3, 256) of its values"
    p = histogram / histogram.sum(1, keepdims=True)
    v = np.arange(256) / 255
    mean = p @ v
    return [mean.round(4).tolist(), np.sqrt(p @ v**2 - mean**2).clip(1e-3).round(4).tolist()]

def _decode_row(source, split, row, px, allow_large, how):
    path = source.frames[split].path[row]
    try: return decode(source.read(path), px, allow_large, *how.split())
    except UserError: raise
    except Exception as e:
        why = 'it has an unknown image format' if isinstance(e, UnidentifiedImageError) else e
        raise UserError(f'{source.path}, {split} row {row+2}: {path} does not decode ({why}): '
                        'replace the image or remove the row') from None
