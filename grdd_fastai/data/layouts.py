"""Assignment of the images of a raw data set to splits: one function for each layout in data/README.md."""
import csv
import posixpath
import random
import re
import sys
from functools import lru_cache
from pathlib import Path

import pandas as pd

from ..core.errors import UserError
from .archives import IMAGES

__all__ = ['SPLITS', 'class_list']


SPLITS = ('train', 'val', 'test') # base, validation and novel classes
MAX_LINE = 2**20 # most characters in a line of a text file
ALIASES = dict(train='train', base='train', val='val', valid='val', validation='val', test='test', novel='test')

def _norm(name):
    "A class name without case, blanks and underscores, for comparison"
    return re.sub(r'[\s_]', '', name).lower()

@lru_cache
def class_list(name):
    "The package's class list `name` ('cifar_fs' or 'mini_imagenet') as a DataFrame with columns label and split: 64/16/20 classes"
    here = Path(__file__).parent.parent # the package
    path = next(p for p in (here/'class_lists'/f'{name}.csv', here.parent/'data'/f'{name}.csv') if p.exists())
    return pd.read_csv(path, dtype=str)


def _split_csvs(tree, seed):
    "Layout: train.csv, val.csv and test.csv with columns filename and label; images beside them or in images/ beside them"
    csvs = [''] if tree.has('train.csv') else [f.removesuffix('train.csv') for f in tree.files if f.endswith('/train.csv')]
    if not csvs: return
    base = min(csvs, key=lambda f: (f.count('/'), f)) # the folder nearest to the root
    frames = []
    for split in SPLITS:
        name = f'{base}{split}.csv'
        if not tree.has(name):
            raise UserError(f'{tree.path}: {base}train.csv is there but {name} is not: give all of train.csv, val.csv and test.csv')
        frames.append(_read_csv(tree, name).assign(split=split))
    return pd.concat(frames, ignore_index=True)

def _read_csv(tree, name):
    "The rows of a CSV as a DataFrame with columns filename, label and path; UserError at the first wrong row"
    where = f'{tree.path}, {name}'
    base = name.rpartition('/')[0]
    found = []
    seen = set()
    def image(n, filename, label):
        row = f'{where}, row {n}'
        empty = 'label' if filename else 'filename'
        if not filename or not label: raise UserError(f'{row}: the {empty} is empty: fill it in or remove the row')
        f = posixpath.normpath(filename)
        if f.startswith(('/', '../')) or f == '..':
            raise UserError(f'{row}: {filename} lies outside the data folder: give a path relative to images/ or to the CSV')
        path = next((p for p in (posixpath.join(base, 'images', f), posixpath.join(base, f)) if tree.has(p)), None)
        if path in seen: raise UserError(f'{row}: {filename} is listed twice: an image may be in one row only')
        seen.add(path)
        if path is None:
            raise UserError(f'{row}: {filename} is neither in images/ beside the CSV nor beside it, or is a link out of the folder: '
                            'add the image or remove the row')
        return filename,label,path
    try:
        with tree.lines(name) as lines:
            rows = csv.reader(read_lines(lines), strict=True)
            header = next(rows, None)
            if not header: raise UserError(f'{where} is empty: it needs the columns filename,label and one row per image')
            missing = [c for c in ('filename','label') if c not in header]
            if missing:
                lacks = f'column {missing[0]}' if len(missing) == 1 else f'columns {missing[0]}, {missing[1]}'
                has = ', '.join(header[:20])
                raise UserError(f'{where} lacks the {lacks}: it has {has}')
            twice = next((c for c in ('filename','label') if header.count(c) > 1), None)
            if twice: raise UserError(f'{where} has {header.count(twice)} columns {twice}: leave one of them')
            columns = header.index('filename'),header.index('label')
            for n,row in enumerate(rows, 2):
                if not row: continue
                if len(row) != len(header):
                    raise UserError(f'{where}, row {n} has {len(row)} fields, the header {len(header)}: mend the row')
                found.append(image(n, *(row[c] for c in columns)))
    except UserError: raise
    except (csv.Error, UnicodeDecodeError) as e: raise UserError(f'{where} is not a readable CSV ({e}): save it as CSV in UTF-8') from None
    except Exception as e: raise UserError(f'{where} cannot be read ({e}): fetch it again') from None # damage can raise any error
    if not found: raise UserError(f'{where} has no rows: it needs a row (filename,label) an image')
    return pd.DataFrame(found, columns=['filename','label','path'])

def read_lines(f):
    "Yield the lines of an open text file; ValueError for a line of more than `MAX_LINE` characters"
    while line := f.readline(MAX_LINE):
        if len(line) == MAX_LINE: raise ValueError(f'a line has more than {MAX_LINE} characters')
        yield line

def _official_cifar_fs(tree, seed):
    "Layout: data/<class>/*.png with splits/bertinetto/{train,val,test}.txt"
    roots = [f.removesuffix('splits/bertinetto/train.txt') for f in tree.files if f.endswith('splits/bertinetto/train.txt')]
    if not roots: return
    split_of = {}
    for split in SPLITS:
        f = f'{roots[0]}splits/bertinetto/{split}.txt'
        if not tree.has(f): raise UserError(f'{tree.path} lacks {f}: fetch CIFAR-FS again')
        try:
            with tree.lines(f) as lines: names = {c for line in read_lines(lines) for c in line.split()}
        except (UnicodeDecodeError, ValueError) as e:
            raise UserError(f'{tree.path}, {f} is no list of classes ({e}): fetch CIFAR-FS again') from None
        for c in sorted(names):
            if c in split_of:
                raise UserError(f'{tree.path}: class {c} is in both {split_of[c]} and {split}: the classes of the splits must be disjoint')
            split_of[c] = split
    df = _images(tree, roots[0]+'data/')
    missing = sorted(set(split_of) - set(df.label))
    if missing:
        raise UserError(f'{tree.path}: class {missing[0]} is in splits/bertinetto but has no images in {roots[0]}data/: '
                        'fetch CIFAR-FS again')
    return df.assign(split=df.label.map(split_of)).dropna()

def _split_folders(tree, seed):
    """Layout: train, val and test folders above class folders; other usual names of the splits are in `ALIASES`

    The images of train may lie in it directly, as one class, for a training without labels.
    """
    df = _images(tree)
    parts = df.path.str.split('/')
    for depth in range(parts.str.len().max() - 2):
        of = parts.str[depth].str.lower().map(ALIASES)
        split = of.where(parts.str.len() > depth + 2)
        flat = set(SPLITS) - set(split.dropna()) # without class folders
        if not flat <= set(of.where(parts.str.len() == depth + 2).dropna()) or flat == set(SPLITS): continue
        if flat - {'train'}:
            name = min(flat - {'train'})
            raise UserError(f'{tree.path}: the images of {name} lie in it directly: put them into a folder for each class')
        if flat: split = split.where(split.notna(), of.where((of == 'train') & (parts.str.len() == depth + 2)))
        return _without(tree, df.assign(split=split), split.isna(), 'outside the train, val and test folders')

def _known_classes(tree, seed):
    "Layout: class folders at any depth that are exactly the classes of a class list of the package; the list splits them"
    df = _images(tree)
    for name in ('cifar_fs','mini_imagenet'):
        known = {_norm(c):(c, s) for c,s in class_list(name).itertuples(index=False)}
        other = ~df.label.map(_norm).isin(set(known))
        if set(df.label[~other].map(_norm)) == set(known) and other.mean() < .1: # ImageNet itself holds these classes among many others
            df = _without(tree, df, other, f'outside the class folders of {name}')
            return df.assign(split=[known[_norm(c)][1] for c in df.label], label=[known[_norm(c)][0] for c in df.label])

def _class_folders(tree, seed):
    "Layout: class folders without splits; `seed` assigns 64/16/20 % of the classes to train, val and test"
    df = _images(tree)
    classes = sorted(df.label.unique())
    if len(classes) < 3:
        folders = 'folder' if len(classes) == 1 else 'folders'
        raise UserError(f'{tree.path} has {len(classes)} class {folders}: '
                        'at least 3 are needed, one for each of train, val and test')
    n_val,n_test = (max(1, round(r*len(classes))) for r in (.16, .2))
    random.Random(seed).shuffle(classes)
    split_of = {c:'val' if i < n_val else 'test' if i < n_val+n_test else 'train' for i,c in enumerate(classes)}
    return df.assign(split=df.label.map(split_of))

def _without(tree, df, drop, why):
    "The rows of `df` without those in the mask `drop`, with a printed warning"
    if drop.any(): print(f'{tree.path}: {drop.sum()} images {why} are left out, {df.path[drop].iloc[0]} the first', file=sys.stderr)
    return df[~drop]

def _images(tree, prefix=''):
    "DataFrame (filename, label, path) of all images below `prefix`; the label is the name of the folder"
    paths = [f for f in tree.files if f.startswith(prefix) and '/' in f and IMAGES.search(f)]
    if not paths:
        raise UserError(f'{tree.path}: no split CSVs and no images in class folders found: '
                        'see data/README.md for the layouts that are read')
    nameless = next((f for f in paths if not f.split('/')[-2].strip()), None)
    if nameless is not None: raise UserError(f'{tree.path}: {nameless} lies in a class folder without a name: give it one')
    return pd.DataFrame(dict(filename=[f.removeprefix(prefix) for f in paths], label=[f.split('/')[-2] for f in paths], path=paths))

LAYOUTS = [_split_csvs, _official_cifar_fs, _split_folders, _known_classes, _class_folders]
