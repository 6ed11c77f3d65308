"""Raw few-shot data sets in their usual layouts, read as one table of (filename, label) for each split."""
import hashlib
import os
import re
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ..core.errors import UserError, first_line
from ..core.storage import read_bytes, user_path
from .archives import PARTS, open_tree
from .arrays import ArrayTree, as_arrays
from .class_lists import ALIASES, SPLITS, list_of, read_split, usual_split
from .layouts import has_own_lists, table_of
from .parts import Part, class_names

__all__ = ['Source', 'open_source', 'prepare']


CONTROL = re.compile('[\x00-\x1f\x7f-\x9f\u2028\u2029]')


class Source:
    """A raw data set: DataFrames `frames[split]` with columns filename, label and path, and `read(path)` for the bytes of an image

    `split` takes the place of the data's own splits (`read_split`), and `asked` is the file of the tree that the user named. UserError if
    splits are empty or share a class, if an image is listed twice, or if a name holds a control character.
    """
    def __init__(self, tree, seed=0, split=None, asked=None):
        rows = None if split is None else read_split(split)
        df,by_seed = table_of(tree, seed, None if split is None else (split, rows), asked)
        used = [seed if by_seed else '', *([asked] if asked else []), *([] if split is None else [digest_of(rows)])]
        place = getattr(tree, 'key', None) or Path(tree.path).resolve()
        self.key = ' '.join(map(str, (place, *used))) # everything that determines the splits
        self.tree = tree
        self.path = tree.path
        self.read = tree.read
        self.frames = {s:df.loc[df.split==s, ['filename','label','path']].reset_index(drop=True) for s in SPLITS}
        self._check(df)

    def _check(self, df):
        for column in ('label', 'filename'):
            bad = next((v for v in df[column] if CONTROL.search(v)), None)
            if bad is not None:
                raise UserError(f'{self.path}: the {column} {bad!r} holds a control character, such as the end of a line: rename it')
        split_of = {}
        for label,split in df[['label', 'split']].drop_duplicates().itertuples(index=False):
            if (first := split_of.setdefault(label, split)) != split:
                raise UserError(f'{self.path}: class {label} is in both {first} and {split}: the classes of the splits must be disjoint')
        alike = {}
        for label,split in split_of.items():
            alike.setdefault(unicodedata.normalize('NFKC', ' '.join(label.split())).casefold(), []).append((label, split))
        for classes in alike.values():
            classes.sort(key=lambda o: SPLITS.index(o[1]))
            if len({s for _,s in classes}) > 1:
                names = ' and '.join(f'{label!r} ({s})' for label,s in classes)
                print(f'warning: {self.path}: the classes {names} differ in case, blanks or Unicode form alone: '
                      'if they are one class, the splits are not disjoint', file=sys.stderr)
        again = df[df.duplicated('path')]
        if len(again): raise UserError(f'{self.path}: {again.filename.iloc[0]} is listed twice: an image may be in one row only')
        for s in SPLITS:
            if self.frames[s].empty: raise UserError(f'{self.path}: the {s} split has no images')

    @property
    def name(self):
        "Name of the class list of the package that the splits follow, else the name of the file or folder"
        return list_of({s:set(df.label) for s,df in self.frames.items()}) or self.tree.name

    def stamp(self):
        "A hash that changes with any CSV row and with any image (its size and time, or its checksum); the images are not decoded"
        h = hashlib.sha256()
        for s,df in self.frames.items():
            for r in df.itertuples(): h.update(repr((s, r.filename, r.label, r.path, self.tree.stamp(r.path))).encode())
        return h.hexdigest()


def digest_of(df): return hashlib.sha256(pd.util.hash_pandas_object(df, index=False).to_numpy().tobytes()).hexdigest()


class TableSource(Source):
    """A `Source` of a DataFrame with the columns filename, label and split, or of a dict of DataFrames by split

    A file is an absolute path or relative to the working folder. UserError for other columns and splits, and for files that are not there.
    """
    name,path = 'table','the DataFrame'
    def __init__(self, data):
        if not len(data): raise UserError('the DataFrame is empty: give the rows of train, val and test')
        for df in data.values() if isinstance(data, dict) else ():
            if not isinstance(df, pd.DataFrame): raise UserError(f'the data of a split is a {type(df).__name__}: give a DataFrame')
        frames = [df.assign(split=split) for split,df in data.items()] if isinstance(data, dict) else [data]
        for df in frames:
            for column in ('filename', 'label', 'split'):
                if column not in df.columns:
                    has = ', '.join(map(str, df.columns))
                    raise UserError(f'the DataFrame lacks the column {column!r}, it has {has}: it needs filename, label and split '
                                    '(train, val or test), or give a dict of DataFrames by split')
        df = pd.concat([d[['filename', 'label', 'split']] for d in frames], ignore_index=True)
        if df.isna().any(axis=None):
            raise UserError('the DataFrame has empty cells in filename, label or split: fill them in or leave the rows out')
        df = df.astype(str)
        df['split'] = [usual_split(s, 'the DataFrame') for s in df.split]
        df['path'] = [str(user_path(f).absolute()) for f in df.filename]
        gone = next((f for f in df.path if not Path(f).is_file()), None)
        if gone is not None: raise UserError(f'the DataFrame names {gone}, which is not there: check the column filename')
        self.frames = {s:df.loc[df.split == s, ['filename', 'label', 'path']].reset_index(drop=True) for s in SPLITS}
        self.key = f'table {digest_of(df)}'
        self._check(df)
    def read(self, path): return read_bytes(path)
    def stamp(self):
        h = hashlib.sha256()
        for df in self.frames.values():
            for f in df.path: h.update(repr((f, (about := os.stat(f)).st_size, about.st_mtime_ns)).encode())
        return h.hexdigest()


# ---- data sets in memory ----------------------------------------------------------------------------------------------

class DatasetTree(ArrayTree):
    "A tree of the images of torch, torchvision or Hugging Face data sets, by split; every image is read to see whether one has changed"
    def __init__(self, sets):
        parts = {ALIASES.get(str(s).lower(), str(s)):dataset_part(ds, f'the data set of {s}') for s,ds in sets.items()}
        super().__init__('the data set', 'dataset', parts, None)
        self.stamps = {f:hashlib.sha1(self.read(f)).hexdigest() for f in self.table.path}
        self.key = f'data set {digest_of(self.table.assign(stamp=list(self.stamps.values())).drop(columns="split"))}'
    def stamp(self, f): return self.stamps[f]

class _Column:
    "Entry `key` of the items of a data set, by row"
    def __init__(self, ds, key): self.ds,self.key = ds,key
    def __getitem__(self, i): return self.ds[i][self.key]

def dataset_part(ds, where):
    "The `Part` of a map-style data set: of torch, with items (image, label), or of Hugging Face, with a column of images and one of labels"
    if not (hasattr(ds, '__getitem__') and hasattr(ds, '__len__')) or isinstance(ds, str | bytes | Mapping):
        raise UserError(f'{where} is a {type(ds).__name__}: give a path, a DataFrame, or a data set with a length and items (image, label)')
    n = len(ds)
    if n == 0: raise UserError(f'{where} is empty')
    features = getattr(ds, 'features', None)
    if isinstance(features, Mapping): # Hugging Face
        image = next((k for k,f in features.items() if type(f).__name__ == 'Image'), None)
        label = next((k for k in ('label', 'fine_label', 'labels', 'class') if k in features), None)
        if image is None or label is None:
            raise UserError(f'{where} has the columns {", ".join(features)}: a column of images and one named label were looked for')
        names = getattr(features[label], 'names', None)
        return Part(_Column(ds, image), class_names(dict(labels=list(ds[label])) | (dict(names=list(names)) if names else {}), n, where))
    item = ds[0]
    if not isinstance(item, tuple | list) or len(item) < 2: raise UserError(f'{where} has items of another kind than (image, label)')
    if hasattr(item[0], 'is_floating_point') and item[0].is_floating_point():
        raise UserError(f'{where} gives tensors: leave out its transform, so that it gives images')
    labels = getattr(ds, 'targets', None) if getattr(ds, 'target_transform', None) is None else None
    labels = np.asarray([ds[i][1] for i in range(n)] if labels is None else labels).tolist()
    names = getattr(ds, 'classes', None)
    return Part(_Column(ds, 0), class_names(dict(labels=labels) | (dict(names=list(names)) if names else {}), n, where))


# ---- opening ----------------------------------------------------------------------------------------------------------

def open_source(
    # path in any layout of data/README.md; DataFrame, or dict of DataFrames by split (`TableSource`); data set of torch or Hugging Face,
    # or a dict of them by split (`DatasetTree`); None: CIFAR-FS through `untar_data`
    data=None,
    seed=0, # seed that splits a folder of class folders
    split=None, # name or path of a list of classes or images that splits the data in another way (`read_split`)
):
    "The raw data set at `data` as a `Source`; UserError if there is none"
    tables = data.values() if isinstance(data, Mapping) else [data]
    if not tables or any(isinstance(v, pd.DataFrame) for v in tables):
        if split is not None: raise UserError('a DataFrame has a column split: leave split out, or change the column')
        return TableSource(data)
    if data is not None and not isinstance(data, str | os.PathLike):
        return Source(DatasetTree(data if isinstance(data, Mapping) else dict(all=data)), seed, split)
    path = _download() if data is None else data
    if isinstance(path, str) and path.startswith('hf://'): path = _from_hub(path)
    tree = open_tree(path)
    file = Path(path).expanduser()
    asked = file.name if file.is_file() and file.suffix.lower() in PARTS else None
    if not has_own_lists(tree, asked): tree = as_arrays(tree, asked) or tree
    return Source(tree, seed, split, asked)

def _from_hub(address):
    "Folder with the parquet files of hf://datasets/<owner>/<name>, fetched from the Hugging Face hub or from its cache"
    from huggingface_hub import snapshot_download

    from ..core.hub import quick_offline
    name = address.removeprefix('hf://').removeprefix('datasets/').strip('/')
    try:
        with quick_offline(): return snapshot_download(name, repo_type='dataset', allow_patterns='**/*.parquet')
    except Exception as e:
        why = f'{type(e).__name__}: {first_line(e)}'
        raise UserError(f'{address} could not be fetched ({why}): give --data the path of a data set') from None

def _download():
    from fastai.data.external import URLs, untar_data
    try: return untar_data(URLs.CIFAR_100)
    except Exception as e:
        raise UserError(f'CIFAR-100 could not be fetched ({type(e).__name__}: {e}): '
                        'give --data the path of a data set, or --demo') from None


def prepare(
    data:str|Path|None, # path in any layout; None: fetch CIFAR-FS
    out:str|Path, # new or empty folder for train.csv, val.csv, test.csv and images/
    seed:int=0, # seed that splits a folder of class folders
    split:str|Path|None=None, # list of classes or images in place of the data's own splits (`read_split`)
) -> Path:
    "Write `data` to the folder `out` as split CSVs and images, and return the folder; UserError if that fails"
    source = open_source(data, seed, split)
    try:
        out = user_path(out, '--out').resolve()
        if out.exists() and (not out.is_dir() or any(out.iterdir())): raise UserError(f'{out} is there already: give --out a new folder')
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{out.name}-', dir=out.parent) as tmp:
            whole = Path(tmp)/'whole'
            for split,df in source.frames.items():
                names = ['/'.join([split, *(p for p in path.split('/') if p not in ('', '.', '..'))]) for path in df.path]
                again = next((p for p,n in zip(df.path, Counter(names).values()) if n > 1), None) if len(set(names)) < len(names) else None
                if again: raise UserError(f'{source.path}: {again} and another image would become one file: rename one of them')
                for text in (*names, *df.label.unique()):
                    try: text.encode()
                    except UnicodeEncodeError: raise UserError(f'{source.path}: the name {text!r} is not UTF-8: rename it') from None
                for path,name in zip(df.path, names):
                    target = whole/'images'/name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(source.read(path))
                text = df.assign(filename=names)[['filename','label']].to_csv(index=False)
                (whole/f'{split}.csv').write_bytes(text.encode(errors='surrogateescape'))
            if out.exists(): out.rmdir()
            whole.rename(out)
    except (OSError, RuntimeError) as e:
        raise UserError(f'{out} cannot be written ({getattr(e, "strerror", None) or e}): give --out a folder that can') from None
    return out
