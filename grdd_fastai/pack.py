"""Images decoded once into a memory-mapped uint8 cache, row i = CSV row i."""
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from fastcore.imports import IN_NOTEBOOK
from fastprogress.fastprogress import progress_bar
from PIL import Image, ImageOps, UnidentifiedImageError

from .demo import DemoSource
from .errors import UserError
from .prepare import SPLITS, open_source

__all__ = ['Split', 'FewShotData', 'few_shot_data', 'default_cache', 'decode']

BLOCK = 1024 # images decoded at a time


def default_cache():
    "$XDG_CACHE_HOME/grdd_fastai, or ~/.cache/grdd_fastai"
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home()/'.cache')/'grdd_fastai'


def decode(image, px):
    "The bytes of an image in any format -> RGB uint8 (px, px, 3): upright, shorter side to `px`, centre crop"
    im = ImageOps.exif_transpose(Image.open(io.BytesIO(image)))
    if im.mode.startswith('I'): im = Image.fromarray((np.asarray(im) / 256).clip(0, 255).astype(np.uint8)) # 16 bit
    im = im.convert('RGB')
    return np.asarray(im if im.size == (px, px) else ImageOps.fit(im, (px, px), Image.Resampling.BICUBIC))


class Split:
    "One split: `images` uint8 (N, px, px, 3), `y` int64 (N), `vocab` the class names, `df` (filename, label)"
    def __init__(self, name, images, df):
        self.name,self.images,self.df = name,images,df
        self.vocab = sorted(df.label.unique())
        self.y = df.label.map({c:i for i,c in enumerate(self.vocab)}).to_numpy(np.int64)
    def __len__(self): return len(self.y)
    def __repr__(self): return f'Split({self.name}: {len(self)} images, {len(self.vocab)} classes, {self.images.shape[1]} px)'


class FewShotData:
    "The splits `train`, `val` and `test` of a data set with the base classes' `stats` (mean, std) and a `fingerprint`"
    def __init__(self, folder):
        meta = json.loads((folder/'meta.json').read_text())
        self.name,self.px,self.fingerprint,self.stats = (meta[k] for k in ('name','px','fingerprint','stats'))
        self.folder = folder
        for s in SPLITS:
            df = pd.read_csv(folder/f'{s}.csv', dtype=str, keep_default_na=False)
            setattr(self, s, Split(s, np.load(folder/f'{s}.npy', mmap_mode='r'), df))
    def __repr__(self): return f'FewShotData({self.name}: {self.train}, {self.val}, {self.test})'


def few_shot_data(
    data=None, # raw data set in any layout of data/README.md; None fetches CIFAR-FS, 'demo' draws the embedded data set
    px=32, # side of the packed images
    cache=None, # folder for the packed images (default: `default_cache()`)
    seed=0, # splits a folder of class folders, draws the demo
):
    "Pack `data` once, and again when its CSVs or images change, and open it"
    source = DemoSource(seed) if data == 'demo' else open_source(data, seed)
    cache,stamp = Path(cache or default_cache()).expanduser(),source.stamp()
    key = hashlib.sha256(f'{Path(source.path).resolve()} {px} {seed}'.encode()).hexdigest()[:12]
    folder = cache/f'{source.name}-{px}-{key}'
    try: fresh = json.loads((folder/'meta.json').read_text())['stamp'] == stamp
    except (OSError, ValueError, KeyError): fresh = False
    if not fresh: _pack(source, px, stamp, folder)
    return FewShotData(folder)


def _pack(source, px, stamp, folder):
    "Decode `source` into a new folder beside `folder`, then put it in its place"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tmp = Path(tempfile.mkdtemp(prefix=f'.{folder.name}-', dir=folder.parent))
    except OSError as e: raise UserError(f'the cache folder {folder.parent} cannot be written ({e.strerror}): give --cache another') from None
    try:
        fingerprint,histogram = hashlib.sha256(),np.zeros((3, 256), np.int64)
        n = {s:len(df) for s,df in source.frames.items()}
        print(f'packing {sum(n.values())} images of {source.name} at {px} px', file=sys.stderr)
        images = {s:np.lib.format.open_memmap(tmp/f'{s}.npy', 'w+', np.uint8, (n[s], px, px, 3)) for s in n}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            blocks = [(s, at) for s in n for at in range(0, n[s], BLOCK)]
            for s,at in progress_bar(blocks) if IN_NOTEBOOK or sys.stderr.isatty() else blocks:
                rows = range(at, min(at+BLOCK, n[s]))
                block = np.stack(list(pool.map(lambda row: _decode_row(source, s, row, px), rows)))  # noqa: B023
                images[s][at:at+len(block)] = block
                fingerprint.update(block.tobytes())
                if s == 'train': histogram += [np.bincount(block[..., c].ravel(), minlength=256) for c in range(3)]
        for s,df in source.frames.items():
            images[s].flush()
            csv = df[['filename','label']].to_csv(index=False)
            (tmp/f'{s}.csv').write_text(csv)
            fingerprint.update(csv.encode())
        (tmp/'meta.json').write_text(json.dumps(dict(
            name=source.name, px=px, source=str(source.path), stamp=stamp, fingerprint=fingerprint.hexdigest(), stats=_stats(histogram))))
        shutil.rmtree(folder, ignore_errors=True)
        tmp.rename(folder)
    except OSError as e: raise UserError(f'the cache {folder} cannot be written ({e.strerror}): give --cache another folder') from None
    finally: shutil.rmtree(tmp, ignore_errors=True)


def _stats(histogram):
    "Mean and standard deviation of each channel in [0, 1] from the counts (3, 256) of its values"
    p,v = histogram / histogram.sum(1, keepdims=True),np.arange(256) / 255
    mean = p @ v
    return [mean.round(4).tolist(), np.sqrt(p @ v**2 - mean**2).clip(1e-3).round(4).tolist()]

def _decode_row(source, split, row, px):
    path = source.frames[split].path[row]
    try: return decode(source.read(path), px)
    except UserError: raise
    except Exception as e:
        why = 'it is no image that is known' if isinstance(e, UnidentifiedImageError) else e
        raise UserError(f'{source.path}, {split} row {row+2}: {path} does not decode ({why}): replace the image or remove the row') from None
