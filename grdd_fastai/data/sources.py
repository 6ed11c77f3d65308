"""Raw few-shot data sets in their usual layouts, read as one table of (filename, label) for each split."""
import hashlib
import os
import re
import sys
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import pandas as pd

from ..core.errors import UserError
from ..core.storage import read_bytes, user_path
from .archives import _open_tree
from .layouts import ALIASES, LAYOUTS, SPLITS, _class_folders, _norm, class_list

__all__ = ['Source', 'open_source', 'prepare']


CONTROL = re.compile('[\x00-\x1f\x7f-\x9f\u2028\u2029]')


class Source:
    """A raw data set: DataFrames `frames[split]` with columns filename, label and path, and `read(path)` for the bytes of an image

    UserError if splits are empty or share a class, if an image is listed twice, or if a name holds a control character.
    """
    def __init__(self, tree, seed=0):
        layout,df = next((f, d) for f,d in ((f, f(tree, seed)) for f in LAYOUTS) if d is not None)
        used_seed = seed if layout is _class_folders else ''
        self.key = f'{Path(tree.path).resolve()} {used_seed}' # everything that determines the splits
        self.tree = tree
        self.path = tree.path
        self.read = tree.read
        self.frames = {s:df.loc[df.split==s, ['filename','label','path']].reset_index(drop=True) for s in SPLITS}
        self._check(df)

    def _check(self, df):
        for column in ('label', 'filename'):
            bad = next((v for v in df[column].unique() if CONTROL.search(v)), None)
            if bad is not None:
                raise UserError(f'{self.path}: the {column} {bad!r} holds a control character, such as the end of a line: rename it')
        splits = df.groupby('label').split.unique()
        for label,s in splits[splits.str.len() > 1].items():
            raise UserError(f'{self.path}: class {label} is in both {s[0]} and {s[1]}: the classes of the splits must be disjoint')
        alike = {}
        for label,(s,) in splits.items():
            alike.setdefault(unicodedata.normalize('NFKC', ' '.join(label.split())).casefold(), []).append((label, s))
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
        "'cifar_fs' or 'mini_imagenet' if the splits are those of that data set, else the name of the file or folder"
        mine = {(_norm(c), s) for s,df in self.frames.items() for c in df.label.unique()}
        return next((n for n in ('cifar_fs','mini_imagenet')
                     if mine == {(_norm(c), s) for c,s in class_list(n).itertuples(index=False)}), self.tree.name)

    def stamp(self):
        "A hash that changes with any CSV row and with any image (its size and time, or its checksum); the images are not decoded"
        h = hashlib.sha256()
        for s,df in self.frames.items():
            for r in df.itertuples(): h.update(repr((s, r.filename, r.label, r.path, self.tree.stamp(r.path))).encode())
        return h.hexdigest()


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
        odd = next((s for s in df.split.unique() if s.lower() not in ALIASES), None)
        if odd is not None: raise UserError(f'the DataFrame has the split {odd!r}: a split is train, val or test')
        df['split'] = df.split.str.lower().map(ALIASES)
        df['path'] = [str(user_path(f).absolute()) for f in df.filename]
        gone = next((f for f in df.path if not Path(f).is_file()), None)
        if gone is not None: raise UserError(f'the DataFrame names {gone}, which is not there: check the column filename')
        self.frames = {s:df.loc[df.split == s, ['filename', 'label', 'path']].reset_index(drop=True) for s in SPLITS}
        self.key = 'table ' + hashlib.sha256(pd.util.hash_pandas_object(df, index=False).to_numpy().tobytes()).hexdigest()
        self._check(df)
    def read(self, path): return read_bytes(path)
    def stamp(self):
        h = hashlib.sha256()
        for df in self.frames.values():
            for f in df.path: h.update(repr((f, (about := os.stat(f)).st_size, about.st_mtime_ns)).encode())
        return h.hexdigest()


def open_source(
    # path in any layout of data/README.md; DataFrame or dict of DataFrames (`TableSource`); None: CIFAR-FS through `untar_data`
    data=None,
    seed=0, # seed that splits a folder of class folders
):
    "The raw data set at `data` as a `Source`; UserError if there is none"
    if isinstance(data, pd.DataFrame | dict): return TableSource(data)
    return Source(_open_tree(_download() if data is None else data), seed)

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
) -> Path:
    "Write `data` to the folder `out` as split CSVs and images, and return the folder; UserError if that fails"
    source = open_source(data, seed)
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
