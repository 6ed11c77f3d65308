"""Images that lie in arrays, in pickles, .npz, .npy and parquet files, presented as a tree of image files with a class each."""
import io
import json
import posixpath
import re
import struct
import zipfile
from collections.abc import Mapping
from functools import cached_property, lru_cache
from threading import Lock
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from ..core.errors import UserError, first_line
from .archives import unpacked
from .class_lists import ALIASES, usual_names
from .pickles import FileArray, FileBytes, FileRows, unpickle

__all__ = ['ArrayTree', 'Part', 'as_arrays', 'png']


SPLIT = re.compile(rf"(?<![a-z0-9])({'|'.join(sorted(ALIASES, key=len, reverse=True))})(?![a-z0-9])", re.IGNORECASE)
SHARD = re.compile(r'-\d{5}-of-\d{5}(-[0-9a-f]+)?$') # Hugging Face's number of a file among several
IMAGES = ('data', 'image_data', 'images', 'image', 'imgs', 'features', 'x') # usual names of the images
LABELS = ('label_specific', 'fine_labels', 'fine_label', 'labels', 'label', 'targets', 'y')
NAMES = ('label_specific_str', 'fine_label_names', 'class_names', 'classes', 'names')


class Part(NamedTuple):
    "Images of one split, by row: uint8 arrays (H, W, 3), (H, W) or (3, H, W), or the bytes of image files; and the class name of each"
    images: object
    labels: list


class ArrayTree:
    """Images by the paths `<part>/<row>.png`, with their classes in the DataFrame `table` (filename, label, path, split)

    `parts` is a `Part` for each name of a split; a part that is named otherwise has no split. `stamp` changes with the files.
    """
    def __init__(self, path, name, parts, stamp):
        self.path,self.name,self.parts,self._stamp = path,name,parts,stamp
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


# ---- one image --------------------------------------------------------------------------------------------------------

def png(image):
    "The bytes of a PNG file that holds the uint8 array (H, W, 3) or (H, W)"
    buf = io.BytesIO()
    Image.fromarray(image).save(buf, 'png', compress_level=1)
    return buf.getvalue()

def image_file(image):
    "The bytes of an image file from one: as they are, or from an array of pixels or of the file's bytes"
    if isinstance(image, Mapping): # Hugging Face's dict of bytes and path
        if not isinstance(image.get('bytes'), bytes): raise ValueError('it is the name of a file that is not in the table')
        return image['bytes']
    if isinstance(image, Image.Image): return png(np.asarray(image.convert('RGB')))
    if isinstance(image, bytes): return image
    if isinstance(image, FileBytes): return image.read()
    a = np.asarray(image)
    if a.dtype != np.uint8: raise ValueError(f'its numbers are {a.dtype}, give uint8 from 0 to 255')
    if a.ndim == 1 or (a.ndim == 2 and a.shape[1] == 1 and a.shape[0] > 32): return a.tobytes() # as cv2.imencode gives a file
    if a.ndim == 3 and a.shape[0] in (1, 3) and a.shape[2] not in (1, 3, 4): a = a.transpose(1, 2, 0)
    if a.ndim == 3 and a.shape[2] == 1: a = a[..., 0]
    if a.ndim not in (2, 3) or (a.ndim == 3 and a.shape[2] not in (3, 4)): raise ValueError(f'its shape is {a.shape}, give (H, W, 3)')
    return png(np.ascontiguousarray(a))


# ---- images and labels in what a file holds ---------------------------------------------------------------------------

def _found(content, names):
    "The entry of the dict `content` that has the first of the usual `names`, whatever its case, or None"
    lower = {str(k).lower():k for k in content}
    return next((content[lower[n]] for n in names if n in lower), None)

def as_text(name): return name.decode() if isinstance(name, bytes) else str(name)

def with_text_keys(content): return {as_text(k):v for k,v in content.items()}

def is_images(value):
    "Whether `value` can be a list of images: an array of at least three dimensions, or a list of arrays or of bytes"
    if isinstance(value, np.ndarray | FileArray): return value.ndim >= 3
    return isinstance(value, list) and bool(value) and isinstance(value[0], np.ndarray | FileArray | bytes | FileBytes)

def part_of(content, labels=None, where=''):
    "The `Part` in what a file holds, an array, a list or a dict; its labels may be in another one"
    among = with_text_keys(content) if isinstance(content, Mapping) else dict(images=content)
    images = _found(among, IMAGES)
    if not is_images(images): images = next((v for v in among.values() if is_images(v)), None)
    if images is None:
        raise UserError(f'{where} holds no images: an array (N, H, W, 3) of uint8 or a list of encoded images was looked for, '
                        f'under a name such as {", ".join(IMAGES[:3])}')
    if isinstance(images, list) and FileRows.fits(images): images = FileRows(images)
    if labels is None: labels = among
    labels = with_text_keys(labels) if isinstance(labels, Mapping) else dict(labels=labels)
    return Part(images, class_names(labels, len(images), where))

def class_names(content, n, where):
    "The class names (N) in the dict of a file"
    if isinstance(rows := content.get('class_dict'), Mapping): # rows of each class
        labels = [None]*n
        try:
            for name,mine in rows.items():
                for row in mine: labels[row] = as_text(name)
        except (TypeError, IndexError): raise UserError(f'{where}: class_dict names rows that are not there: fetch it again') from None
        if None in labels: raise UserError(f'{where}: class_dict leaves out row {labels.index(None)}: fetch it again')
        return labels
    found = _found(content, LABELS)
    if found is None:
        raise UserError(f'{where} holds no labels: a class for each image was looked for, under a name such as '
                        f'{", ".join(LABELS[-4:])} or class_dict')
    try: labels = np.asarray(found).reshape(-1).tolist()
    except ValueError: raise UserError(f'{where}: the labels are lists of different lengths: each image needs one class') from None
    if len(labels) != n: raise UserError(f'{where} has {n} images and {len(labels)} labels: each image needs one')
    if all(isinstance(y, str | bytes) for y in labels): return [y if isinstance(y, str) else y.decode() for y in labels]
    if not all(type(y) is int or (type(y) is float and y.is_integer()) for y in labels):
        raise UserError(f'{where}: the labels are neither texts nor whole numbers')
    labels = [int(y) for y in labels]
    names = _found(content, ('label2catname',))
    if isinstance(ids := content.get('catname2label'), Mapping): names = {v:k for k,v in ids.items()}
    if names is None: names = _found(content, NAMES)
    if isinstance(names, list | np.ndarray | FileArray) and len(names) == n: return [as_text(c) for c in np.asarray(names).tolist()]
    digits = len(str(max(labels, default=0)))
    if names is None: return [f'{y:0{digits}d}' for y in labels]
    try: return [as_text(names[y]) for y in labels]
    except (KeyError, IndexError, TypeError):
        raise UserError(f'{where}: a label has no name in its list of names: fetch it again') from None


# ---- .npz and .npy ----------------------------------------------------------------------------------------------------

def read_npy(file, where, start=0):
    "The array that begins at the byte `start` of an open file, as a `FileArray`"
    try:
        file.seek(start)
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape,fortran,dtype = header(file)
        at = file.tell()
        size = int(np.prod(shape, dtype=object))*dtype.itemsize
        if file.seek(0, 2) < at + size: raise ValueError('it ends early')
    except Exception as e: raise UserError(f'{where} is not a whole array ({first_line(e)}): write it again by numpy') from None
    if dtype.kind not in 'biufSU': raise UserError(f'{where}: refused an array of {dtype}: an array may hold numbers or texts')
    if dtype.itemsize and shape: return FileArray(FileBytes(file, at, size, Lock()), dtype, shape, 'F' if fortran else 'C')
    raise UserError(f'{where} is an array without numbers')

def read_npz(file, where):
    "The arrays of an .npz file by name; those that are compressed are unpacked into temporary files"
    try:
        with zipfile.ZipFile(file) as z:
            found = {}
            for info in z.infolist():
                inside = f'{where}, {info.filename}'
                if info.compress_type == zipfile.ZIP_STORED:
                    file.seek(info.header_offset)
                    n_name,n_extra = struct.unpack('<26xHH', file.read(30))
                    found[info.filename.removesuffix('.npy')] = read_npy(file, inside, info.header_offset + 30 + n_name + n_extra)
                else:
                    with z.open(info) as member: whole = unpacked(member, info.compress_size, inside)
                    found[info.filename.removesuffix('.npy')] = read_npy(whole, inside)
            return found
    except UserError: raise
    except Exception as e: raise UserError(f'{where} is not a whole .npz file ({first_line(e)}): write it again by numpy') from None


# ---- parquet ----------------------------------------------------------------------------------------------------------

class ParquetImages:
    "Images of several parquet files by row; the row groups that were read last are kept"
    def __init__(self, files, column):
        self.files,self.column,self.lock = files,column,Lock()
        sizes = [(f, g, f.metadata.row_group(g).num_rows) for f in files for g in range(f.num_row_groups)]
        self.groups = [(f, g) for f,g,_ in sizes]
        self.ends = np.cumsum([n for *_,n in sizes])
        self.group = lru_cache(2)(self._group)
    def _group(self, i):
        f,g = self.groups[i]
        return f.read_row_group(g, columns=[self.column]).column(0)
    def __len__(self): return int(self.ends[-1]) if len(self.ends) else 0
    def __getitem__(self, row):
        i = int(np.searchsorted(self.ends, row, 'right'))
        with self.lock: return self.group(i)[row - (self.ends[i-1] if i else 0)].as_py()

def read_parquet(files, where):
    "The `Part` of parquet files, with Hugging Face's names of the classes if they have them"
    try:
        from pyarrow import parquet
    except ImportError: raise UserError(f"{where}: parquet files need pyarrow: pip install 'grdd_fastai[hub]'") from None
    try:
        opened = [parquet.ParquetFile(f) for f in files]
        schema = opened[0].schema_arrow
        image,label = (next((n for n in names if n in schema.names), None) for names in (('image', 'img', *IMAGES), LABELS))
        if image is None or label is None:
            raise UserError(f'{where} has the columns {", ".join(schema.names[:20])}: an image and a label were looked for')
        about = json.loads((schema.metadata or {}).get(b'huggingface', b'{}'))
        names = about.get('info', {}).get('features', {}).get(label, {}).get('names')
        labels = [y for f in opened for y in f.read(columns=[label]).column(0).to_pylist()]
        known = dict(labels=labels) | (dict(names=names) if names else {})
        return Part(ParquetImages(opened, image), class_names(known, len(labels), where))
    except UserError: raise
    except Exception as e: raise UserError(f'{where} is not a whole parquet file ({first_line(e)}): fetch it again') from None


# ---- the files of a tree ----------------------------------------------------------------------------------------------

def _groups(files):
    "{(name without its split, ending): {split: [files]}} of the files that may hold arrays"
    groups = {}
    for f in sorted(files):
        stem,ending = posixpath.splitext(f)
        if ending.lower() not in ('.pkl', '.pickle', '.npz', '.npy', '.parquet'): continue
        stem = SHARD.sub('', stem) if ending.lower() == '.parquet' else stem
        words = list(SPLIT.finditer(stem))
        split = ALIASES[words[-1][0].lower()] if words else None
        key = (stem[:words[-1].start()] + '{}' + stem[words[-1].end():] if words else stem, ending.lower())
        groups.setdefault(key, {}).setdefault(split, []).append(f)
    return groups

def _content(tree, files, ending):
    "What the files of a split hold"
    where = f'{tree.path}, {files[0]}' if files[0] != tree.path.name else str(tree.path)
    if ending == '.parquet': return read_parquet([tree.opened(f) for f in files], where),where
    file = tree.opened(files[0])
    if ending == '.npz': return read_npz(file, where),where
    return (read_npy(file, where) if ending == '.npy' else unpickle(file, where)),where

def as_arrays(tree, asked=None):
    """The `ArrayTree` of a tree whose images lie in arrays, or None if there are no such files

    `asked` is one of the tree's files, which says which set is meant where there are several.
    """
    prefix = next((f.removesuffix('meta') for f in tree.files if posixpath.basename(f) == 'meta'
                   and all(tree.has(f.removesuffix('meta') + part) for part in ('train', 'test'))), None)
    if prefix is not None and asked is None: return CifarArchive(tree, prefix)
    groups = _groups(tree.files)
    labels = {key:files for key,files in groups.items() if 'label' in posixpath.basename(key[0]).lower()}
    sets = {key:files for key,files in groups.items() if key not in labels}
    if not groups: return None
    if asked is not None:
        mine = next((key for key,files in groups.items() if any(asked in fs for fs in files.values())), None)
        if mine in labels: mine = next(iter(sets), None)
        sets = {mine:sets[mine]} if mine else {}
    whole = {key:files for key,files in sets.items() if {'train', 'val', 'test'} <= files.keys()}
    pools = {key:files for key,files in sets.items() if key[1] in ('.npz', '.parquet')}
    if len(whole) > 1:
        names = ', '.join(key.format('train') + ending for key,ending in sorted(whole))
        raise UserError(f'{tree.path} holds several data sets, {names}: give one of these files')
    if not whole and not pools:
        if asked is None and tree.files and not sets: return None
        (name,ending),files = next(iter(sets.items())) if sets else (('{}', '.pkl'), {})
        lacks = [s for s in ('train', 'val', 'test') if s not in files]
        raise UserError(f'{tree.path} has {name.format(next(iter(files), None))}{ending} and no such file for {", ".join(lacks)}: '
                        'put those of train, val and test into one folder')
    (name,ending),files = next(iter((whole or pools).items()))
    parts = {}
    for split in sorted(files, key=str):
        content,where = _content(tree, files[split], ending)
        if isinstance(content, Part): parts[split or 'all'] = content
        elif split is None: parts |= _splits_inside(content, where)
        else: parts[split] = part_of(content, _labels(tree, labels, split), where)
    stem = posixpath.basename(name).replace('{}', '').strip('-_. ')
    stamp = [tree.stamp(f) for fs in (*files.values(), *(fs for g in labels.values() for fs in g.values())) for f in fs]
    return ArrayTree(tree.path, stem or tree.name, parts, stamp)

def _labels(tree, groups, split):
    "What the file of labels of a split holds, or None if there is none"
    found = next(((fs[split], ending) for (_,ending),fs in groups.items() if split in fs), None)
    return None if found is None else _content(tree, *found)[0]

def _splits_inside(content, where):
    "The parts of an .npz file that holds all splits, with names such as train_images, or of one without splits"
    splits = {}
    for key,value in content.items():
        words = list(SPLIT.finditer(key))
        split = ALIASES[words[-1][0].lower()] if words else None
        splits.setdefault(split, {})[SPLIT.sub('', key).strip('_-. ') or 'images'] = value
    if {'train', 'val', 'test'} <= splits.keys():
        names = {k:v for k,v in splits.get(None, {}).items() if k in NAMES}
        return {s:part_of(splits[s] | names, where=where) for s in ('train', 'val', 'test')}
    return dict(all=part_of(content, where=where))
