"""Data sets that lie in arrays, in pickles, .npz, .npy and parquet files, presented as a tree of image files with a class each."""
import posixpath
import re
import sys
from functools import cached_property

import numpy as np
import pandas as pd

from ..core.errors import UserError
from .archives import ARRAYS
from .array_files import read_npy, read_npz, read_parquet
from .class_lists import ALIASES, usual_names
from .parts import LABELS, NAMES, Part, image_file, part_of, png
from .pickles import unpickle

__all__ = ['ArrayTree', 'CifarArchive', 'as_arrays']


SPLIT = re.compile(rf"(?<![a-z0-9])({'|'.join(sorted(ALIASES, key=len, reverse=True))})(?![a-z0-9])", re.IGNORECASE)
SHARD = re.compile(r'-\d{5}-of-\d{5}(-[0-9a-f]+)?$') # Hugging Face's number of a file among several


class ArrayTree:
    """Images by the paths `<part>/<row>.png`, with their classes in the DataFrame `table` (filename, label, path, split)

    `parts` is a `Part` for each name of a split; a part that is named otherwise has no split. `stamp` changes with the files.
    """
    def __init__(self, path, name, parts, stamp):
        self.path,self.name,self.parts,self._stamp = path,name,named(parts, path),stamp
        self.table = pd.concat([self._rows(part) for part in parts], ignore_index=True)
        usual = usual_names({s:set(df.label) for s,df in self.table.groupby('split')})
        self.table['label'] = [usual.get(c, c) for c in self.table.label]
    def _rows(self, part):
        paths = [f'{part}/{i:06d}.png' for i in range(len(self.parts[part].labels))]
        return pd.DataFrame(dict(filename=paths, label=self.parts[part].labels, path=paths, split=ALIASES.get(part)))
    @cached_property
    def files(self): return sorted(self.table.path)
    @cached_property
    def _places(self): return dict(zip(self.table.path, range(len(self.table))))
    def has(self, f): return f in self._places
    def read(self, f):
        part,row = f.split('/')
        return image_file(self.parts[part].images[int(row.removesuffix('.png'))])
    def stamp(self, f): return self._stamp


def named(parts, path):
    "The parts with names in place of classes that are whole numbers; all names have the same number of digits"
    numbers = {s:set(part.labels) for s,part in parts.items() if all(type(y) is int for y in part.labels)}
    if not numbers: return parts
    digits = len(str(max(map(max, numbers.values()))))
    # if each split numbers its classes from 0, and the splits have different numbers of classes, a number means another class in each
    own = len(numbers) > 1 and len(set(map(len, numbers.values()))) > 1 and all(mine == set(range(len(mine))) for mine in numbers.values())
    if own: print(f'{path}: the classes are numbered from 0 in each split: they are taken for other classes in each', file=sys.stderr)
    def name(s, y): return f'{s} {y:0{digits}d}' if own else f'{y:0{digits}d}'
    return {s:part if s not in numbers else part._replace(labels=[name(s, y) for y in part.labels]) for s,part in parts.items()}


class CifarArchive(ArrayTree):
    "CIFAR-100 in the pickles `train`, `test` and `meta`: `<class>/<file>`, and the files have their names in CIFAR-FS"
    def __init__(self, tree, prefix):
        found = {part:unpickle(tree.opened(prefix+part), f'{tree.path}, {prefix}{part}') for part in ('meta', 'train', 'test')}
        try:
            names = found['meta']['fine_label_names']
            rows = []
            for part in ('train', 'test'):
                images,labels = (found[part][k] for k in ('data', 'fine_labels'))
                if images.dtype != np.uint8 or images.shape != (len(labels), 3072): raise ValueError('no array of images')
                files = found[part].get('filenames', [f'{part}_{i:05d}.png' for i in range(len(labels))])
                rows += [(f'{names[y]}/{f}', names[y], part, i) for i,(y,f) in enumerate(zip(labels, files, strict=True))]
            if not all(isinstance(v, str) for row in rows for v in row[:3]): raise ValueError('names that are no texts')
        except Exception as e: raise UserError(f'{tree.path} is not the CIFAR-100 archive ({e!r}): fetch it again') from None
        self.images = {part:found[part]['data'] for part in ('train', 'test')}
        if len({f for f,*_ in rows}) < len(rows): rows = [(f'{c}/{part}_{i:05d}.png', c, part, i) for _,c,part,i in rows]
        self.rows = {f:(part, i) for f,_,part,i in rows}
        self.path,self.name,self._stamp = tree.path,'cifar100',[tree.stamp(prefix+part) for part in found]
        files = sorted(self.rows)
        self.table = pd.DataFrame(dict(filename=files, label=[f.rpartition('/')[0] for f in files], path=files, split=None))
    def read(self, f):
        part,row = self.rows[f]
        return png(self.images[part][row].reshape(3, 32, 32).transpose(1, 2, 0))


# ---- the files of a tree ----------------------------------------------------------------------------------------------

def _groups(files):
    "{(name without its split, ending): {split: [files]}} of the files that may hold arrays"
    groups = {}
    for f in sorted(files):
        stem,ending = posixpath.splitext(f)
        if ending.lower() not in ARRAYS: continue
        stem = SHARD.sub('', stem) if ending.lower() == '.parquet' else stem
        split,word = split_in(stem)
        key = (stem[:word.start()] + '{}' + stem[word.end():] if word else stem, ending.lower())
        groups.setdefault(key, {}).setdefault(split, []).append(f)
    return groups

def split_in(name):
    "The split that a name holds and the place of its word (a match), the last one if there are several; None for both if it holds none"
    words = list(SPLIT.finditer(name))
    word = words[-1] if words else None
    return (ALIASES[word[0].lower()] if word else None),word

def _content(tree, files, ending):
    "What the files of a split hold"
    where = f'{tree.path}, {files[0]}' if files[0] != tree.path.name else str(tree.path)
    if ending == '.parquet': return read_parquet([tree.opened(f) for f in files], where),where
    file = tree.opened(files[0])
    if ending == '.npz': return read_npz(file, where),where
    return (read_npy(file, where) if ending == '.npy' else unpickle(file, where)),where

def as_arrays(tree, asked=None):
    """The `ArrayTree` of a tree whose images lie in arrays, or None if there are no such files

    `asked` is one of the tree's files; it chooses the set if there are several.
    """
    prefix = next((f.removesuffix('meta') for f in tree.files if posixpath.basename(f) == 'meta'
                   and all(tree.has(f.removesuffix('meta') + part) for part in ('train', 'test'))), None)
    if prefix is not None and asked is None: return CifarArchive(tree, prefix)
    groups = _groups(tree.files)
    labels = {key:files for key,files in groups.items() if is_labels(key[0])}
    sets = {key:files for key,files in groups.items() if key not in labels}
    if not groups: return None
    if asked is not None:
        mine = next((key for key,files in groups.items() if any(asked in fs for fs in files.values())), None)
        if mine in labels: mine = next(iter(sets), None)
        sets = {mine:sets[mine]} if mine else {}
    whole = {key:files for key,files in sets.items() if {'train', 'val', 'test'} <= files.keys()}
    pools = {key:files for key,files in sets.items() if key[1] in ('.npz', '.parquet')}
    if len(several := whole or pools) > 1:
        names = ', '.join(key.format(next(iter(fs), None)) + ending for (key,ending),fs in sorted(several.items()))
        raise UserError(f'{tree.path} holds several data sets, {names}: give one of these files')
    if not whole and not pools:
        if asked is None and tree.files and not sets: return None
        (name,ending),files = next(iter(sets.items())) if sets else (('{}', '.pkl'), {})
        lacks = [s for s in ('train', 'val', 'test') if s not in files]
        raise UserError(f'{tree.path} has {name.format(next(iter(files), None))}{ending} and no such file for {", ".join(lacks)}: '
                        'put those of train, val and test into one folder')
    (name,ending),files = next(iter((whole or pools).items()))
    parts = {}
    double = next((fs for fs in files.values() if len(fs) > 1), None)
    if double and ending != '.parquet': raise UserError(f'{tree.path} has {double[0]} and {double[1]} for one split: leave one of them')
    for split in sorted(files, key=str):
        content,where = _content(tree, files[split], ending)
        if isinstance(content, Part): parts[split or 'all'] = content
        elif split is None: parts |= _splits_inside(content, where)
        else: parts[split] = part_of(content, _labels(tree, labels, split), where)
    stem = posixpath.basename(name).replace('{}', '').strip('-_. ')
    stamp = [tree.stamp(f) for fs in (*files.values(), *(fs for g in labels.values() for fs in g.values())) for f in fs]
    return ArrayTree(tree.path, stem or tree.name, parts, stamp)

def is_labels(name):
    "Whether a file's name, without its split, is that of labels: it holds the word, or is one of their usual names"
    stem = posixpath.basename(name).lower().replace('{}', '').strip('-_. ')
    return 'label' in stem or stem in LABELS

def _labels(tree, groups, split):
    "What the file of labels of a split holds, or None if there is none"
    found = next(((fs[split], ending) for (_,ending),fs in groups.items() if split in fs), None)
    return None if found is None else _content(tree, *found)[0]

def _splits_inside(content, where):
    "The parts of an .npz file that holds all splits, with names such as train_images, or of one without splits"
    splits = {}
    for key,value in content.items():
        splits.setdefault(split_in(key)[0], {})[SPLIT.sub('', key).strip('_-. ') or 'images'] = value
    if {'train', 'val', 'test'} <= splits.keys():
        names = {k:v for k,v in splits.get(None, {}).items() if k in NAMES}
        return {s:part_of(splits[s] | names, where=where) for s in ('train', 'val', 'test')}
    return dict(all=part_of(content, where=where))
