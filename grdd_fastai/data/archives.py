"""Readers for the files of a raw data set: a folder, a zip archive, or CIFAR-100's pickles."""
import hashlib
import io
import os
import pickle
import posixpath
import re
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ..core.errors import UserError
from ..core.storage import read_bytes

MAX_LINKS = 4 # most links that are followed to one folder
MAX_BYTES = 2**28 # most bytes in one unpacked member of an archive
ENDINGS = 'png|jpe?g|bmp|webp|gif|tiff?|ppm|pgm' # regular expression for the file endings of images
IMAGES = re.compile(rf'(^|/)[^./][^/]*\.({ENDINGS})$', re.IGNORECASE)


class Folder:
    """Regular files below a folder, by relative path

    A link is followed if it stays inside the folder. Other links (out of the folder, to nowhere, in a circle), pipes and devices are left
    out, with one warning.
    """
    def __init__(self, path):
        self.path = Path(path)
        self.root = self.path.resolve()
        self.name = self.root.name
    @cached_property
    def files(self):
        found,self.left_out = [],[]
        folders = ['']
        visits = Counter()
        while folders: folders += self._entries(folders.pop(), visits, found)
        if self.left_out:
            print(f'{self.path}: {len(self.left_out)} links that lead out of the folder, '
                  'nowhere or in a circle, pipes and devices are left out, '
                  f'{min(self.left_out)} the first', file=sys.stderr)
        return sorted(found)
    def _entries(self, below, visits, found):
        """Append the files in the folder `below` to `found` and return its subfolders

        At most `MAX_LINKS` links are followed to any one folder, so a circle of links comes to an end.
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
                    if self.root.joinpath(below).resolve().is_relative_to(real) or visits[real] >= MAX_LINKS:
                        self.left_out.append(f)
                        continue
                    visits[real] += 1
                inner.append(f'{f}/')
            elif e.is_file(): found.append(f)
            else: self.left_out.append(f)
        return inner
    def _inside(self, f):
        "The real path of `f`, or None if `f` leads out of the folder or to nowhere"
        try: real = (self.root/f).resolve(strict=True)
        except (OSError, ValueError, RuntimeError): return None # a dangling link, a circle, or a name no file can have
        return real if real.is_relative_to(self.root) else None
    @cached_property
    def _names(self): return frozenset(self.files)
    def has(self, f): return f in self._names
    def read(self, f):
        try: return read_bytes(self._inside(f) or self.root/f, MAX_BYTES)
        except OSError as e: raise UserError(f'{self.path/f} cannot be read ({e.strerror}): mend or replace it') from None
    def lines(self, f): return io.TextIOWrapper(io.BytesIO(self.read(f)), 'utf-8-sig', newline='')
    def stamp(self, f):
        st = (self.root/f).stat()
        return st.st_size,st.st_mtime_ns


class Zip:
    "Members of a zip archive by name; the archive is not unpacked to disk"
    def __init__(self, path):
        self.path = Path(path)
        self.name = self.path.stem
        try: self.zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as e: raise UserError(f'{path} is not a readable zip archive ({e}): fetch it again') from None
        self.infos = {i.filename:i for i in self.zip.infolist()
                      if i.filename and not i.is_dir() and not i.filename.startswith('__MACOSX')}
    @cached_property
    def files(self): return sorted(self.infos)
    def has(self, f): return f in self.infos
    def read(self, f):
        self._check_size(f)
        try: return self.zip.read(self.infos[f])
        except Exception as e: raise UserError(f'{self.path}: {f} cannot be read from the archive ({e}): fetch it again') from None
    def _check_size(self, f):
        size = self.infos[f].file_size
        if size > MAX_BYTES:
            raise UserError(f'{self.path}: {f} would unpack to {size >> 20} MiB: remove it, no file of a data set is so large')
    def lines(self, f):
        "Open a member as text and unpack it while it is read"
        self._check_size(f)
        try: return io.TextIOWrapper(self.zip.open(self.infos[f]), 'utf-8-sig', newline='')
        except Exception as e: raise UserError(f'{self.path}: {f} cannot be read from the archive ({e}): fetch it again') from None
    def stamp(self, f): return self.infos[f].file_size,self.infos[f].CRC


class ArrayUnpickler(pickle.Unpickler):
    "Loads only arrays, lists, dicts, strings and numbers, because a pickle could otherwise run any code; UserError for anything else"
    allowed = {(m, n) for m in ('numpy.core.multiarray','numpy._core.multiarray') for n in ('_reconstruct','scalar')} | {
        ('numpy','ndarray'), ('numpy','dtype'), ('_codecs','encode'),
        ('numpy.core.numeric','_frombuffer'), ('numpy._core.numeric','_frombuffer')}
    def find_class(self, module, name):
        if (module, name) in self.allowed: return super().find_class(module, name)
        raise UserError(f'refused to unpickle {module}.{name}: only arrays, lists, dicts, strings and numbers are loaded')


class CifarPickles:
    "torchvision's CIFAR-100 archive (the pickles `train`, `test` and `meta`), presented as class folders of PNG files"
    def __init__(self, path, read, prefix):
        self.path = Path(path)
        self.name = 'cifar100'
        tables = {}
        for part in ('meta','train','test'):
            try: tables[part] = ArrayUnpickler(io.BytesIO(read(prefix+part)), encoding='latin1').load()
            except UserError as e: raise UserError(f'{path}, {prefix}{part}: {e}') from None
            except Exception as e: raise UserError(f'{path}, {prefix}{part}: not a CIFAR-100 pickle ({e}): fetch it again') from None
        try:
            names = tables['meta']['fine_label_names']
            self.images = {}
            for part in ('train','test'):
                images = tables[part]['data']
                labels = tables[part]['fine_labels']
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
    "The bytes of a PNG file that holds the uint8 array (H, W, 3)"
    buf = io.BytesIO()
    Image.fromarray(image).save(buf, 'png')
    return buf.getvalue()


def _open_tree(path):
    "The `Folder`, `Zip` or `CifarPickles` at `path`; UserError if there is none"
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
            members = {posixpath.normpath(m.name):m for m in tar.getmembers() if m.isfile() and m.size <= MAX_BYTES}
            metas = [f for f in members if posixpath.basename(f) == 'meta']
            if not metas: raise UserError(f"{path} is not CIFAR-100's python archive: unpack it and give its folder")
            parts = {f:tar.extractfile(members[f]).read()
                     for f in (posixpath.join(posixpath.dirname(metas[0]), part) for part in ('meta','train','test')) if f in members}
            while tar.fileobj.read(2**20): pass # read to the end, where the archive's checksum is tested
        return CifarPickles(path, parts.__getitem__, metas[0].removesuffix('meta'))
    except (EOFError, tarfile.TarError, zlib.error, OSError) as e:
        raise UserError(f'{path} is not a whole archive ({e}): fetch it again') from None
