"""Raw few-shot data sets, in the layouts people hold them in, as three pandas split CSVs of (filename, label)."""
import csv
import hashlib
import io
import os
import pickle
import posixpath
import random
import re
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from .errors import UserError
from .storage import read_bytes, user_path

__all__ = ['SPLITS', 'Source', 'open_source', 'prepare', 'class_list']

SPLITS = ('train', 'val', 'test') # base, validation and novel classes
LINKS = 4 # at most so many links to the same folder are followed
LONGEST = 2**20 # characters in a line of a text file
LARGEST = 2**28 # bytes a member of an archive may unpack to
ALIASES = dict(train='train', base='train', val='val', valid='val', validation='val', test='test', novel='test')
IMAGES = re.compile(r'(^|/)[^./][^/]*\.(png|jpe?g|bmp|webp|gif|tiff?|ppm|pgm)$', re.IGNORECASE)


CONTROL = re.compile('[\x00-\x1f\x7f-\x9f\u2028\u2029]')

def _norm(name): return re.sub(r'[\s_]', '', name).lower()

@lru_cache
def class_list(name):
    "The committed class list `name` ('cifar_fs', 'mini_imagenet') as a frame of (label, split), 64/16/20 classes"
    here = Path(__file__).parent
    path = next(p for p in (here/'class_lists'/f'{name}.csv', here.parent/'data'/f'{name}.csv') if p.exists())
    return pd.read_csv(path, dtype=str)


# ---- where bytes come from: a folder, a zip, or CIFAR-100's pickles ---------------------------------------------------

class Folder:
    """Regular files below a folder by relative path; a link is followed where it stays inside the folder

    Links that lead out, nowhere or in a circle, pipes and devices are left out, which is said once.
    """
    def __init__(self, path):
        self.path,self.root = Path(path),Path(path).resolve()
        self.name = self.root.name
    @cached_property
    def files(self):
        found,self.left_out = [],[]
        folders,visits = [''],Counter()
        while folders: folders += self._entries(folders.pop(), visits, found)
        if self.left_out:
            print(f'{self.path}: {len(self.left_out)} links that lead out of the folder, '
                  'nowhere or in a circle, pipes and devices are left out, '
                  f'{min(self.left_out)} the first', file=sys.stderr)
        return sorted(found)
    def _entries(self, below, visits, found):
        """Append the files in the folder `below` to `found` and return its folders

        Links are followed to each folder a few times at most, so that a circle of links ends.
        """
        inner = []
        try: entries = list(os.scandir(self.root/below))
        except OSError as e: raise UserError(f'{self.path/below} cannot be read ({e.strerror}): mend it or remove it') from None
        for e in entries:
            f = f'{below}{e.name}'
            real = self._inside(f) if e.is_symlink() else self.root/f
            if real is None: self.left_out.append(f)
            elif e.is_dir():
                if e.is_symlink():
                    if self.root.joinpath(below).resolve().is_relative_to(real) or visits[real] >= LINKS: self.left_out.append(f); continue
                    visits[real] += 1
                inner.append(f'{f}/')
            elif e.is_file(): found.append(f)
            else: self.left_out.append(f)
        return inner
    def _inside(self, f):
        "The real path of `f`, or None if it leads out of the folder or nowhere"
        try: real = (self.root/f).resolve(strict=True)
        except (OSError, ValueError, RuntimeError): return None # a dangling link, a circle, or a name no file can have
        return real if real.is_relative_to(self.root) else None
    @cached_property
    def _names(self): return frozenset(self.files)
    def has(self, f): return f in self._names
    def read(self, f):
        try: return read_bytes(self._inside(f) or self.root/f, LARGEST)
        except OSError as e: raise UserError(f'{self.path/f} cannot be read ({e.strerror}): mend or replace it') from None
    def lines(self, f): return io.TextIOWrapper(io.BytesIO(self.read(f)), 'utf-8-sig', newline='')
    def stamp(self, f): st = (self.root/f).stat(); return st.st_size,st.st_mtime_ns


class Zip:
    "Members of a zip archive by name, read in place"
    def __init__(self, path):
        self.path,self.name = Path(path),Path(path).stem
        try: self.zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as e: raise UserError(f'{path} is not a readable zip archive ({e}): fetch it again') from None
        self.infos = {i.filename:i for i in self.zip.infolist()
                      if not i.is_dir() and not i.filename.startswith('__MACOSX')}
    @cached_property
    def files(self): return sorted(self.infos)
    def has(self, f): return f in self.infos
    def read(self, f):
        self._check_size(f)
        try: return self.zip.read(self.infos[f])
        except Exception as e: raise UserError(f'{self.path}: {f} cannot be read from the archive ({e}): fetch it again') from None
    def _check_size(self, f):
        size = self.infos[f].file_size
        if size > LARGEST:
            raise UserError(f'{self.path}: {f} would unpack to {size >> 20} MiB: remove it, no file of a data set is so large')
    def lines(self, f):
        "Open a member as text; it is unpacked while it is read"
        self._check_size(f)
        try: return io.TextIOWrapper(self.zip.open(self.infos[f]), 'utf-8-sig', newline='')
        except Exception as e: raise UserError(f'{self.path}: {f} cannot be read from the archive ({e}): fetch it again') from None
    def stamp(self, f): return self.infos[f].file_size,self.infos[f].CRC


class ArrayUnpickler(pickle.Unpickler):
    "Loads arrays, lists, dicts, strings and numbers, and refuses anything else: a pickle can otherwise run any code"
    allowed = {(m, n) for m in ('numpy.core.multiarray','numpy._core.multiarray') for n in ('_reconstruct','scalar')} | {
        ('numpy','ndarray'), ('numpy','dtype'), ('_codecs','encode'),
        ('numpy.core.numeric','_frombuffer'), ('numpy._core.numeric','_frombuffer')}
    def find_class(self, module, name):
        if (module, name) in self.allowed: return super().find_class(module, name)
        raise UserError(f'refused to unpickle {module}.{name}: only arrays, lists, dicts, strings and numbers are loaded')


class CifarPickles:
    "torchvision's CIFAR-100 archive (`train`, `test`, `meta` pickles), seen as class folders of PNGs"
    def __init__(self, path, read, prefix):
        self.path,self.name,tables = Path(path),'cifar100',{}
        for part in ('meta','train','test'):
            try: tables[part] = ArrayUnpickler(io.BytesIO(read(prefix+part)), encoding='latin1').load()
            except UserError as e: raise UserError(f'{path}, {prefix}{part}: {e}') from None
            except Exception as e: raise UserError(f'{path}, {prefix}{part}: not a CIFAR-100 pickle ({e}): fetch it again') from None
        try:
            names,self.images = tables['meta']['fine_label_names'],{}
            for part in ('train','test'):
                images,labels = tables[part]['data'],tables[part]['fine_labels']
                if (not isinstance(images, np.ndarray) or images.dtype != np.uint8 or not isinstance(labels, list)
                    or len(labels) != len(images)):
                    raise ValueError('no array of images')
                images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                for i,(image,y) in enumerate(zip(images, labels)):
                    self.images[f'{names[y]}/{part}_{i:05d}.png'] = image
        except Exception as e: raise UserError(f'{path}: not the CIFAR-100 archive ({e!r}): fetch it again') from None
        self.files = sorted(self.images)
    def has(self, f): return f in self.images
    def read(self, f): return png(self.images[f])
    def stamp(self, f): return hashlib.sha1(self.images[f].tobytes()).hexdigest()


def png(image):
    "A uint8 array (H, W, 3) as the bytes of a PNG"
    buf = io.BytesIO()
    Image.fromarray(image).save(buf, 'png')
    return buf.getvalue()


def _open_tree(path):
    try: there = (path := Path(path).expanduser()).exists()
    except (OSError, RuntimeError, ValueError, TypeError): there = False
    if not there: raise UserError(f"no such file or folder: {path}; give --data a folder, a zip or CIFAR-100's archive")
    if path.is_dir():
        tree = Folder(path)
        for prefix in ('', 'cifar-100-python/'):
            if all(tree.has(prefix+f) for f in ('train','test','meta')): return CifarPickles(path, tree.read, prefix)
        return tree
    if not path.is_file(): raise UserError(f'{path} is neither a folder nor a regular file: unpack the data and give its folder')
    if zipfile.is_zipfile(path):
        tree = Zip(path)
        prefix = next((f.removesuffix('meta') for f in tree.files if f.endswith('cifar-100-python/meta')), None)
        return tree if prefix is None else CifarPickles(path, tree.read, prefix)
    try:
        if not tarfile.is_tarfile(path):
            raise UserError(f'{path} is neither a folder, a zip nor a tar archive: unpack it and give its folder')
        with tarfile.open(path) as tar:
            members = {posixpath.normpath(m.name):m for m in tar.getmembers() if m.isfile() and m.size <= LARGEST}
            metas = [f for f in members if posixpath.basename(f) == 'meta']
            if not metas: raise UserError(f"{path} is not CIFAR-100's python archive: unpack it and give its folder")
            parts = {f:tar.extractfile(members[f]).read()
                     for f in (posixpath.join(posixpath.dirname(metas[0]), part) for part in ('meta','train','test')) if f in members}
            while tar.fileobj.read(2**20): pass # the archive's own checksum stands at its end
        return CifarPickles(path, parts.__getitem__, metas[0].removesuffix('meta'))
    except (EOFError, tarfile.TarError, zlib.error, OSError) as e:
        raise UserError(f'{path} is not a whole archive ({e}): fetch it again') from None


# ---- which images belong to which split: one function a layout, each a frame or None --------------------------------

def _split_csvs(tree, seed):
    "train/val/test.csv of (filename, label), images in images/ beside them or beside them"
    csvs = [''] if tree.has('train.csv') else [f.removesuffix('train.csv') for f in tree.files if f.endswith('/train.csv')]
    if not csvs: return
    base,frames = min(csvs, key=lambda f: (f.count('/'), f)),[]
    for split in SPLITS:
        name = f'{base}{split}.csv'
        if not tree.has(name):
            raise UserError(f'{tree.path}: {base}train.csv is there but {name} is not: give all of train.csv, val.csv and test.csv')
        frames.append(_read_csv(tree, name).assign(split=split))
    return pd.concat(frames, ignore_index=True)

def _read_csv(tree, name):
    "Read the rows of a CSV one by one, and stop with a sentence at the first that is wrong"
    where,base,found,seen = f'{tree.path}, {name}',name.rpartition('/')[0],[],set()
    def image(n, filename, label):
        row = f'{where}, row {n}'
        if not filename or not label:
            raise UserError(f'{row}: the {"label" if filename else "filename"} is empty: fill it in or remove the row')
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
            rows = csv.reader(whole_lines(lines), strict=True)
            header = next(rows, None)
            if not header: raise UserError(f'{where} is empty: it needs the columns filename,label and a row an image')
            missing = [c for c in ('filename','label') if c not in header]
            if missing:
                raise UserError(f'{where} lacks the column{"s"[:len(missing)-1]} {", ".join(missing)}: it has {", ".join(header[:20])}')
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
    except Exception as e: raise UserError(f'{where} cannot be read ({e}): fetch it again') from None # whatever a damaged archive gives
    if not found: raise UserError(f'{where} has no rows: it needs a row (filename,label) an image')
    return pd.DataFrame(found, columns=['filename','label','path'])

def whole_lines(f):
    "Yield the lines of an open text file; ValueError for a line that is too long to be a row"
    while line := f.readline(LONGEST):
        if len(line) == LONGEST: raise ValueError(f'a line has more than {LONGEST} characters')
        yield line

def _official_cifar_fs(tree, seed):
    "data/<class>/*.png with splits/bertinetto/{train,val,test}.txt"
    roots = [f.removesuffix('splits/bertinetto/train.txt') for f in tree.files if f.endswith('splits/bertinetto/train.txt')]
    if not roots: return
    split_of = {}
    for split in SPLITS:
        f = f'{roots[0]}splits/bertinetto/{split}.txt'
        if not tree.has(f): raise UserError(f'{tree.path} lacks {f}: fetch CIFAR-FS again')
        try:
            with tree.lines(f) as lines: names = {c for line in whole_lines(lines) for c in line.split()}
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
    "train/val/test folders above class folders"
    df = _images(tree)
    parts = df.path.str.split('/')
    for depth in range(parts.str.len().max() - 2):
        split = parts.str[depth].str.lower().map(ALIASES).where(parts.str.len() > depth + 2)
        if set(split.dropna()) == set(SPLITS):
            return _without(tree, df.assign(split=split), split.isna(), 'outside the train, val and test folders')

def _known_classes(tree, seed):
    "Class folders, at any depth and in any part, that are exactly a committed class list's: the list splits them"
    df = _images(tree)
    for name in ('cifar_fs','mini_imagenet'):
        known = {_norm(c):(c, s) for c,s in class_list(name).itertuples(index=False)}
        other = ~df.label.map(_norm).isin(set(known))
        if set(df.label[~other].map(_norm)) == set(known) and other.mean() < .1: # all of ImageNet is not miniImageNet
            df = _without(tree, df, other, f'outside the class folders of {name}')
            return df.assign(split=[known[_norm(c)][1] for c in df.label], label=[known[_norm(c)][0] for c in df.label])

def _class_folders(tree, seed):
    "Class folders: 64/16/20 % of the classes by `seed`"
    df = _images(tree)
    classes = sorted(df.label.unique())
    if len(classes) < 3:
        raise UserError(f'{tree.path} has {len(classes)} class folder{"s"[:len(classes)!=1]}: '
                        'at least 3 are needed, one for each of train, val and test')
    n_val,n_test = (max(1, round(r*len(classes))) for r in (.16, .2))
    random.Random(seed).shuffle(classes)
    split_of = {c:'val' if i < n_val else 'test' if i < n_val+n_test else 'train' for i,c in enumerate(classes)}
    return df.assign(split=df.label.map(split_of))

def _without(tree, df, drop, why):
    if drop.any(): print(f'{tree.path}: {drop.sum()} images {why} are left out, {df.path[drop].iloc[0]} the first', file=sys.stderr)
    return df[~drop]

def _images(tree, prefix=''):
    "Every image below `prefix`, labelled with its folder's name"
    paths = [f for f in tree.files if f.startswith(prefix) and '/' in f and IMAGES.search(f)]
    if not paths:
        raise UserError(f'{tree.path}: no split CSVs and no images in class folders found: '
                        'see data/README.md for the layouts that are read')
    nameless = next((f for f in paths if not f.split('/')[-2].strip()), None)
    if nameless is not None: raise UserError(f'{tree.path}: {nameless} lies in a class folder without a name: give it one')
    return pd.DataFrame(dict(filename=[f.removeprefix(prefix) for f in paths], label=[f.split('/')[-2] for f in paths], path=paths))

LAYOUTS = (_split_csvs, _official_cifar_fs, _split_folders, _known_classes, _class_folders)


class Source:
    "A raw data set: `frames[split]` of (filename, label, path) and `read(path)`, the bytes of an image"
    def __init__(self, tree, seed=0):
        layout,df = next((f, d) for f,d in ((f, f(tree, seed)) for f in LAYOUTS) if d is not None)
        self.key = f'{Path(tree.path).resolve()} {seed if layout is _class_folders else ""}' # what the splits depend on
        self.tree,self.path,self.read = tree,tree.path,tree.read
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
        for of in alike.values():
            of.sort(key=lambda o: SPLITS.index(o[1]))
            if len({s for _,s in of}) > 1:
                print(f'warning: {self.path}: the classes ' + ' and '.join(f'{label!r} ({s})' for label,s in of) +
                      ' differ in case, blanks or Unicode form alone: if they are one class, the splits are not disjoint', file=sys.stderr)
        again = df[df.duplicated('path')]
        if len(again): raise UserError(f'{self.path}: {again.filename.iloc[0]} is listed twice: an image may be in one row only')
        for s in SPLITS:
            if self.frames[s].empty: raise UserError(f'{self.path}: the {s} split has no images')

    @property
    def name(self):
        "'cifar_fs' or 'mini_imagenet' where the splits are that data set's, else the source's own name"
        mine = {(_norm(c), s) for s,df in self.frames.items() for c in df.label.unique()}
        return next((n for n in ('cifar_fs','mini_imagenet')
                     if mine == {(_norm(c), s) for c,s in class_list(n).itertuples(index=False)}), self.tree.name)

    def stamp(self):
        "Changes when a CSV row or an image does (by size and time, or checksum), without reading the images"
        h = hashlib.sha256()
        for s,df in self.frames.items():
            for r in df.itertuples(): h.update(repr((s, r.filename, r.label, r.path, self.tree.stamp(r.path))).encode())
        return h.hexdigest()


def open_source(
    data=None, # a path in any layout of data/README.md, or None: CIFAR-FS through `untar_data(URLs.CIFAR_100)`
    seed=0, # splits a folder of class folders
):
    "The raw data set at `data`; UserError where there is none"
    return Source(_open_tree(_download() if data is None else data), seed)

def _download():
    from fastai.data.external import URLs, untar_data
    try: return untar_data(URLs.CIFAR_100)
    except Exception as e:
        raise UserError(f'CIFAR-100 could not be fetched ({type(e).__name__}: {e}): '
                        'give --data the path of a data set, or --demo') from None


def prepare(
    data, # a path in any layout, or None to fetch CIFAR-FS
    out, # folder to fill with train.csv, val.csv, test.csv and images/; it must not exist or be empty
    seed=0, # splits a folder of class folders
):
    "Write `data` out as split CSVs plus images and return the folder"
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
