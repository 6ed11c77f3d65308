"""Assignment of the images of a raw data set to splits: one function for each layout in data/README.md."""
import json
import posixpath
import random
import re
import sys

import numpy as np
import pandas as pd

from ..core.errors import UserError, first_line
from .archives import ARRAYS, IMAGES, ClassTars
from .arrays import ArrayTree
from .class_lists import ALIASES, CLASS_LISTS, SPLITS, class_list, normal, read_lines, read_table, usual_split

__all__ = ['table_of', 'has_own_lists']


# ---- lists that come with the images ----------------------------------------------------------------------------------

def _own_lists(tree, ending):
    "Folder, ending with / unless it is the root, in which train, val and test files with the ending lie, or None; the nearest to the root"
    found = ['' if '/' not in f else f.removesuffix(f'train{ending}') for f in tree.files if posixpath.basename(f) == f'train{ending}']
    return min(found, key=lambda f: (f.count('/'), f)) if found else None

def has_own_lists(tree, asked=None):
    """Whether the tree has CSVs or JSON files that assign its images to splits, and images in files

    Lists beside arrays, such as those of Ravi and Larochelle, say nothing about the arrays.
    """
    if asked: return asked.lower().endswith(('.csv', '.json'))
    if all(_own_lists(tree, ending) is None for ending in ('.csv', '.json')): return False
    return any(IMAGES.search(f) for f in tree.files) or not any(f.lower().endswith(ARRAYS) for f in tree.files)

def _one_of_each_split(tree, base, ending):
    "Yield each split and the name of its file, such as train.csv, in the folder `base`; UserError if one is missing"
    every = [f'{split}{ending}' for split in SPLITS]
    for split,name in zip(SPLITS, every):
        if not tree.has(base + name):
            raise UserError(f'{tree.path}: {base}{every[0]} is there but {base}{name} is not: give all of {", ".join(every)}')
        yield split,base + name

def _split_csvs(tree, seed, asked):
    "Layout: train.csv, val.csv and test.csv with a file and a class in each row; the images lie beside them or in images/ beside them"
    if asked and (not asked.lower().endswith('.csv') or posixpath.basename(asked).lower()[:-4] in ALIASES): asked = None
    if asked: # one CSV with a column split
        df = read_table(tree, asked, ('filename', 'label', 'split'))
        df['split'] = [usual_split(s, tree.path) for s in df.split]
        return _with_paths(tree, asked, df)
    base = _own_lists(tree, '.csv')
    if base is None: return
    frames = []
    for split,name in _one_of_each_split(tree, base, '.csv'):
        frames.append(_with_paths(tree, name, read_table(tree, name)).assign(split=split))
    return pd.concat(frames, ignore_index=True)

def _with_paths(tree, name, df):
    "The rows of a CSV with the path of each image in the tree; UserError at the first row whose image is not there or listed twice"
    base = name.rpartition('/')[0]
    paths,seen = [],set()
    for n,filename,label in zip(df.row, df.filename, df.label):
        row = f'{tree.path}, {name}, row {n}'
        f = posixpath.normpath(filename)
        if f.startswith(('/', '../')) or f == '..':
            raise UserError(f'{row}: {filename} lies outside the data folder: give a path relative to images/ or to the CSV')
        places = [posixpath.join(base, d, inner) for inner in (f, posixpath.join(label, f)) for d in ('images', '')]
        path = next((p for p in places if tree.has(p)), None)
        if path is None and RANK.fullmatch(f): path = ranked(tree, base, df).get((label, f))
        if path in seen: raise UserError(f'{row}: {filename} is listed twice: an image may be in one row only')
        seen.add(path)
        if path is None:
            raise UserError(f'{row}: {filename} is neither in images/ beside the CSV nor beside it, nor there in a folder of its class, or '
                            'is a link out of the folder: add the image or remove the row')
        paths.append(path)
    return df.drop(columns='row').assign(path=paths)

def _split_jsons(tree, seed, asked):
    "Layout: train.json, val.json and test.json with the names of classes and their folders (class_names, class_roots), as easyfsl has them"
    base = _own_lists(tree, '.json')
    if base is None: return
    all_images = _images(tree)
    folders = {}
    for i,f in enumerate(all_images.path): folders.setdefault(f.rpartition('/')[0], []).append(i)
    frames = []
    for split,name in _one_of_each_split(tree, base, '.json'):
        where = f'{tree.path}, {name}'
        try: about = json.loads(tree.read(name))
        except (ValueError, RecursionError) as e: raise UserError(f'{where} is no JSON ({first_line(e)}): mend it') from None
        names,roots = (about.get(k) if isinstance(about, dict) else None for k in ('class_names', 'class_roots'))
        if not all(isinstance(v, list) and v and all(isinstance(o, str) for o in v) for v in (names, roots)) or len(names) != len(roots):
            raise UserError(f'{where}: the lists class_names and class_roots were looked for, with a folder for each class')
        for label,root in zip(names, roots):
            rows = folders.get(_nearest(root, folders))
            if rows is None: raise UserError(f'{where}: the folder {root} of {label} has no images here: add it or leave the class out')
            frames.append(all_images.iloc[rows].assign(label=label, split=split))
    return pd.concat(frames, ignore_index=True)

def _nearest(root, folders):
    "The folder whose last parts are most of the last parts of `root`, which may start above or below the data; None for none or several"
    parts = [p for p in root[-2000:].replace('\\', '/').split('/') if p not in ('', '.', '..')][-8:]
    for i in range(len(parts)):
        end = '/'.join(parts[i:])
        found = [f for f in folders if f == end or f.endswith(f'/{end}')]
        if found: return found[0] if len(found) == 1 else None

def _official_cifar_fs(tree, seed, asked):
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
    df = df[[c in split_of for c in df.label]]
    return df.assign(split=[split_of[c] for c in df.label])


# ---- folders and arrays -----------------------------------------------------------------------------------------------

def _array_splits(tree, seed, asked):
    "Layout: pickles, .npz or parquet files of train, val and test, unless all of them have the same classes"
    if not isinstance(tree, ArrayTree) or tree.table.split.isna().any(): return
    classes = [set(df.label) for _,df in tree.table.groupby('split')]
    alike = all(c == classes[0] for c in classes)
    if len(classes) == len(SPLITS) and not alike: return tree.table
    why = 'its splits have the same classes' if alike else f'it has {" and ".join(sorted(set(tree.table.split)))} alone'
    print(f'{tree.path}: {why}, so that all images are put together and split by class', file=sys.stderr)

def _split_folders(tree, seed, asked):
    """Layout: train, val and test folders above class folders; other usual names of the splits are in `ALIASES`

    The images of train may lie in it directly, as one class, for a training without labels.
    """
    if isinstance(tree, ArrayTree): return
    if isinstance(tree, ClassTars) and not any(p.lower() in ALIASES for c in tree.tars for p in c.split('/')): return
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

def _known_classes(tree, seed, asked):
    "Layout: classes that are exactly those of a class list of the package; the list splits them"
    if isinstance(tree, ClassTars) and not any(set(map(normal, tree.classes)) == _known(name).keys() for name in CLASS_LISTS): return
    df = _images(tree)
    for name in CLASS_LISTS:
        known = _known(name)
        names = [normal(c) for c in df.label]
        other = np.array([c not in known for c in names])
        if not known.keys() <= set(names): continue
        if other.mean() < .1: # ImageNet itself holds these classes among many others
            df = _without(tree, df, other, f'outside the class folders of {name}')
            return df.assign(split=[known[normal(c)][1] for c in df.label], label=[known[normal(c)][0] for c in df.label])
        print(f'{tree.path} holds the classes of {name} among others: --split {name} takes them alone', file=sys.stderr)

def _class_folders(tree, seed, asked):
    "Layout: classes without splits; `seed` assigns 64/16/20 % of them to train, val and test"
    df = _images(tree)
    classes = sorted(set(df.label))
    if len(classes) < 3:
        folders = 'folder' if len(classes) == 1 else 'folders'
        raise UserError(f'{tree.path} has {len(classes)} class {folders}: '
                        'at least 3 are needed, one for each of train, val and test')
    n_val,n_test = (max(1, round(r*len(classes))) for r in (.16, .2))
    random.Random(seed).shuffle(classes)
    split_of = {c:'val' if i < n_val else 'test' if i < n_val+n_test else 'train' for i,c in enumerate(classes)}
    return df.assign(split=[split_of[c] for c in df.label])

def _known(name):
    "{normal name: (label, split)} of a class list"
    return {normal(c):(c, s) for c,s in class_list(name)[['label', 'split']].itertuples(index=False)}

def _without(tree, df, drop, why):
    "The rows of `df` without those in the mask `drop`, with a printed warning"
    if drop.any(): print(f'{tree.path}: {drop.sum()} images {why} are left out, {df.path[drop].iloc[0]} the first', file=sys.stderr)
    return df[~drop]

def _images(tree, prefix=''):
    "DataFrame (filename, label, path) of all images below `prefix`; the label is the name of the folder"
    if isinstance(tree, ArrayTree): return tree.table.drop(columns='split')
    paths = [f for f in tree.files if f.startswith(prefix) and '/' in f and IMAGES.search(f)]
    if not paths:
        raise UserError(f'{tree.path}: no images in class folders, no train.csv and no pickles or arrays of train, val and test found: '
                        'see data/README.md for the layouts that are read')
    nameless = next((f for f in paths if not f.split('/')[-2].strip()), None)
    if nameless is not None: raise UserError(f'{tree.path}: {nameless} lies in a class folder without a name: give it one')
    columns = dict(filename=[f.removeprefix(prefix) for f in paths], label=[f.split('/')[-2] for f in paths], path=paths)
    return pd.DataFrame(columns, dtype=object) # texts of pandas may not hold names that are no UTF-8


# ---- the split that is asked for --------------------------------------------------------------------------------------

def _by_list(tree, rows, split):
    "The images of a tree that the list `rows` (`read_split`) names; `split` is what the user called it"
    if isinstance(tree, ClassTars): tree = tree.keep(set(rows.label))
    df = _images(tree)
    known = {normal(c):(c, s) for c,s in rows[['label', 'split']].itertuples(index=False)}
    names = [normal(c) for c in df.label]
    missing = [c for n,(c,_) in known.items() if n not in set(names)]
    if missing:
        raise UserError(f'{tree.path} has no images of {missing[0]}' + (f' and {len(missing) - 1} more' if len(missing) > 1 else '') +
                        f' of the {len(known)} classes of {split}: give another --split')
    df = df[[c in known for c in names]]
    df = df.assign(label=[known[normal(c)][0] for c in df.label], split=[known[normal(c)][1] for c in df.label])
    return _listed_files(tree, df, rows, split) if 'filename' in rows and isinstance(rows.filename.iloc[0], str) else df

def _listed_files(tree, df, rows, split):
    "The rows of `df` whose files the list names: by name, or by Ravi and Larochelle's number of an image of ImageNet"
    by_name,twice = {},set()
    for i,c,name,path in zip(df.index, df.label, df.filename, df.path):
        by_name[c, name] = by_name[c, path] = i
        key = c,posixpath.basename(path)
        if '/' in path and by_name.setdefault(key, i) != i: twice.add(key)
    for key in twice: by_name.pop(key, None) # several images have this name: only their whole paths tell them apart
    by_rank = None
    found = []
    for c,f in zip(rows.label, rows.filename):
        i = by_name.get((c, f), by_name.get((c, posixpath.basename(f))))
        if i is None and RANK.fullmatch(f):
            if by_rank is None: by_rank = _by_rank({c:mine.path.to_dict() for c,mine in df.groupby('label')}, rows, tree.path)
            i = by_rank.get((c, f))
        if i is None: raise UserError(f'{tree.path} has no image {f} of {c}, which {split} lists: add it or give another --split')
        found.append(i)
    return df.loc[found]


# ---- Ravi and Larochelle's names of the images of ImageNet ------------------------------------------------------------

RANK = re.compile(r'n\d{8}(\d{8})\.jpg') # the second number is the image's position, from 1 on, in its class's files by their number

FULL = 1300 # images in most class folders of ImageNet

def _by_rank(paths, rows, where):
    """{(class, Ravi and Larochelle's name): key} of the rows of a list

    `paths` holds {key: path} of the images of each class. A class folder that has as many images as the list names holds just these. Any
    other one has to be complete, because a missing image would move all positions after it; a warning says which ones may not be.
    """
    found,doubtful = {},[]
    for c,names in rows.groupby('label').filename:
        mine = sorted(paths.get(c, {}), key=lambda k: _number(paths[c][k]))
        names = sorted(f for f in names if RANK.fullmatch(f))
        if len(mine) not in (0, FULL, len(names)): doubtful.append(f'{c} ({len(mine)})')
        places = range(len(names)) if len(names) == len(mine) else [int(RANK.fullmatch(f)[1]) - 1 for f in names]
        found |= {(c, f):mine[i] for f,i in zip(names, places) if 0 <= i < len(mine)}
    if doubtful:
        print(f'warning: {where}: names such as n0153282900000005.jpg are positions in the complete class folders of ImageNet, most of '
              f'which have {FULL} images; {len(doubtful)} folders have another number: {", ".join(doubtful[:5])}. If one is incomplete, '
              'its images are others than those that the list means', file=sys.stderr)
    return found

def _number(path):
    "The last number in a file's name, as in n01532829_719.JPEG"
    return int((re.findall(r'\d+', posixpath.basename(path).rpartition('.')[0]) or ['0'])[-1]),path

def ranked(tree, base, df):
    "{(class, Ravi and Larochelle's name): path} for the images in class folders beside a CSV or in images/ beside it"
    if df.attrs.get('ranked') is None:
        paths = {}
        for f in tree.files:
            folder,_,name = f.rpartition('/')
            if IMAGES.search(f) and folder.rpartition('/')[0] in (posixpath.join(base, 'images'), base.rstrip('/')):
                paths.setdefault(folder.rpartition('/')[2], {})[f] = name
        df.attrs['ranked'] = _by_rank(paths, df, tree.path)
    return df.attrs['ranked']


LAYOUTS = [_split_csvs, _split_jsons, _official_cifar_fs, _array_splits, _split_folders, _known_classes, _class_folders]

def table_of(tree, seed=0, split=None, asked=None):
    """(DataFrame, whether `seed` split it) of the images of a tree: filename, label, path and split

    `split` is a list of classes or images in place of the data's own splits (`read_split`), as (its name, its rows). `asked` is the file
    of the tree that the user named.
    """
    if split is not None: return _by_list(tree, split[1], split[0]),False
    layout,df = next((f, d) for f,d in ((f, f(tree, seed, asked)) for f in LAYOUTS) if d is not None)
    return df,layout is _class_folders
