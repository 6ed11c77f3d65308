"""Readers for the files of a raw data set: a folder, a zip or tar archive, or a tar for each class."""
import io
import os
import posixpath
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock

from ..core.errors import UserError, first_line
from ..core.storage import read_bytes

ARRAYS = ('.pkl', '.pickle', '.npz', '.npy', '.parquet') # endings of files of arrays
TAR = re.compile(r'\.tar$', re.IGNORECASE)
MAX_LINKS = 4 # most links that are followed to one folder
MAX_BYTES = 2**28 # most bytes in one unpacked member of an archive that is read as a whole
MAX_RATIO = 100 # most bytes that one byte of an archive may unpack to, above `MAX_BYTES`
BLOCK = 2**20 # bytes
ENDINGS = 'png|jpe?g|bmp|webp|gif|tiff?|ppm|pgm' # regular expression for the file endings of images
HIDDEN = re.compile(r'(^|/)(\._[^/]*|\.DS_Store|__MACOSX/.*)$') # what macOS leaves in folders and archives
IMAGES = re.compile(rf'(^|/)[^./][^/]*\.({ENDINGS})$', re.IGNORECASE)


class Folder:
    """Regular files below a folder, by relative path

    A link is followed if it stays inside the folder. Other links (out of the folder, to nowhere, in a circle), pipes and devices are left
    out, with one warning. With `deep` false, the folders in the folder are left out.
    """
    def __init__(self, path, deep=True):
        self.path,self.deep = Path(path),deep
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
            if HIDDEN.search(f'{f}/' if e.name == '__MACOSX' else f): continue
            if real is None: self.left_out.append(f)
            elif e.is_dir():
                if not self.deep: continue
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
    def opened(self, f):
        "The file, open for reading and seeking, of any size"
        try: return open(self._inside(f) or self.root/f, 'rb')
        except OSError as e: raise UserError(f'{self.path/f} cannot be read ({e.strerror}): mend or replace it') from None
    def stamp(self, f):
        st = (self.root/f).stat()
        return st.st_size,st.st_mtime_ns


class Zip:
    "Members of a zip archive by name; the archive is not unpacked to disk"
    def __init__(self, path):
        self.path = Path(path)
        self.name = self.path.stem
        try: self.zip = zipfile.ZipFile(path)
        except Exception as e: # a damaged archive can raise any error
            raise UserError(f'{path} is not a readable zip archive ({first_line(e)}): fetch it again') from None
        self.infos = {i.filename:i for i in self.zip.infolist() if i.filename and not i.is_dir() and not HIDDEN.search(i.filename)}
    @cached_property
    def files(self): return sorted(self.infos)
    def has(self, f): return f in self.infos
    def read(self, f):
        self._check_size(f)
        with self._damage(f): return self.zip.read(self.infos[f])
    @contextmanager
    def _damage(self, f):
        "Turn any error of reading the member `f` into a UserError"
        try: yield
        except UserError: raise
        except Exception as e: raise UserError(f'{self.path}: {f} cannot be read from the archive ({e}): fetch it again') from None
    def _check_size(self, f):
        size = self.infos[f].file_size
        if size > MAX_BYTES:
            raise UserError(f'{self.path}: {f} would unpack to {size >> 20} MiB: remove it, no file of a data set is so large')
    def lines(self, f):
        "Open a member as text and unpack it while it is read"
        self._check_size(f)
        with self._damage(f): return io.TextIOWrapper(self.zip.open(self.infos[f]), 'utf-8-sig', newline='')
    def opened(self, f):
        "A temporary file with the unpacked member, open for reading and seeking"
        with self._damage(f), self.zip.open(self.infos[f]) as member:
            return unpacked(member, self.infos[f].compress_size, f'{self.path}: {f}')
    def stamp(self, f): return self.infos[f].file_size,self.infos[f].CRC


class Tar:
    """Regular files in a tar archive by name; a compressed archive is unpacked into one temporary file when it is opened

    A hard link is the file that it is linked to. What is not read is said in one warning: other links, devices, names that lead out of
    the archive, and files that are packed without their empty parts. `file` is the open archive, and `within` another `Tar` and the name
    of the member of it that is the archive.
    """
    def __init__(self, path, file=None, within=None):
        self.path = Path(path)
        self.name = re.sub(r'\.(tar|tgz|tbz2?|txz)(\.\w+)?$', '', self.path.name)
        self.lock,self.start,self.members = Lock(),0,{}
        try:
            if within:
                tar,f = within
                self.lock,self.start = tar.lock,tar.place(f)[0]
                file = tar.opened(f)
            elif file is None: file = _uncompressed(self.path)
            with tarfile.open(fileobj=file, mode='r:') as tar:
                left_out = self._list(tar)
                file.seek(tar.offset) # a whole archive ends with blocks of zeros; tarfile would leave out what follows a damaged header
                if file.read(512) != bytes(512): raise EOFError(f'it ends early or is damaged after {len(self.members)} files')
                if file.read(BLOCK).strip(b'\0'): raise ValueError('another archive follows it: give each alone')
            self.file = within[0].file if within else file
        except UserError: raise
        except Exception as e: # a damaged archive can raise any error
            raise UserError(f'{self.path} is not a whole tar archive ({first_line(e)}): fetch it again') from None
        if left_out:
            print(f'{self.path}: {len(left_out)} links, devices, names that lead out of the archive and files with empty parts are left '
                  f'out, {min(left_out)} the first', file=sys.stderr)
    def _list(self, tar):
        "Enter the files of an open archive into `members`; return the names of what is left out"
        left_out = []
        for m in tar:
            if m.size < 0: raise ValueError(f'{m.name} has a negative size')
            name = posixpath.normpath(m.name)
            target = self.members.get(posixpath.normpath(m.linkname)) if m.islnk() else None
            if m.isdir() or HIDDEN.search(name): pass
            elif name.startswith(('/', '../')) or m.issparse() or not (m.isreg() or target): left_out.append(m.name)
            else: self.members[name] = target or (m.offset_data,m.size,m.mtime)
            tar.members.clear() # which would keep all headers
        return left_out
    @cached_property
    def files(self): return sorted(self.members)
    def has(self, f): return f in self.members
    def place(self, f): return self.start + self.members[f][0],self.members[f][1]
    def read(self, f):
        start,size = self.place(f)
        if size > MAX_BYTES: raise UserError(f'{self.path}: {f} has {size >> 20} MiB: remove it, no file of a data set is so large')
        with self.lock:
            self.file.seek(start)
            return self.file.read(size)
    def lines(self, f): return io.TextIOWrapper(io.BytesIO(self.read(f)), 'utf-8-sig', newline='')
    def opened(self, f): return io.BufferedReader(_Section(self.file, *self.place(f), self.lock), BLOCK)
    def stamp(self, f): return self.members[f],(about := os.fstat(self.file.fileno())).st_size,about.st_mtime_ns


class ClassTars:
    """A tree that has a tar for each class, as ImageNet's training images are kept: `n01440764.tar` is the class folder `n01440764`

    The tars of the classes in `only`, by default all, are opened to list their images.
    """
    def __init__(self, tree, only=None):
        self.tree,self.path,self.name = tree,tree.path,tree.name
        self.tars = {f[:-4]:f for f in tree.files if TAR.search(f)} # class folder -> tar
        self.tars = {c:f for c,f in self.tars.items() if only is None or posixpath.basename(c) in only}
        self.opened_tar = lru_cache(64)(self._tar) # a process may not have many more files open
    @property
    def classes(self): return sorted(map(posixpath.basename, self.tars))
    def keep(self, only): return ClassTars(self.tree, only)
    def _tar(self, c):
        f = self.tars[c]
        if isinstance(self.tree, Tar): return Tar(self.path/f, within=(self.tree, f))
        return Tar(self.path/f, self.tree.opened(f))
    @cached_property
    def members(self): return {f'{c}/{f}':(c, f) for c in self.tars for f in self.opened_tar(c).files}
    @cached_property
    def files(self): return sorted(self.members)
    def has(self, f): return f in self.members
    def read(self, f):
        c,member = self.members[f]
        return self.opened_tar(c).read(member)
    def stamp(self, f): return self.tree.stamp(self.tars[self.members[f][0]])


class _Section(io.RawIOBase):
    "A part of an open file, as a file of its own"
    def __init__(self, file, start, size, lock): self.file,self.start,self.size,self.at,self.lock = file,start,size,0,lock
    def readable(self): return True
    def seekable(self): return True
    def tell(self): return self.at
    def seek(self, at, whence=0):
        self.at = at + (0, self.at, self.size)[whence]
        return self.at
    def readinto(self, buffer):
        n = max(0, min(len(buffer), self.size - self.at))
        with self.lock:
            self.file.seek(self.start + self.at)
            found = self.file.read(n)
        buffer[:len(found)] = found
        self.at += len(found)
        return len(found)


# ---- opening ----------------------------------------------------------------------------------------------------------

def unpacked(stream, size, where):
    "A temporary file with what `stream` gives; UserError if that is far more than the `size` bytes that it is packed into"
    out = tempfile.TemporaryFile()  # noqa: SIM115 (its user closes it)
    limit = MAX_BYTES + MAX_RATIO*size
    while block := stream.read(BLOCK):
        if out.tell() + len(block) > limit: raise UserError(f'{where} unpacks to more than {limit >> 20} MiB: no archive of images does')
        if shutil.disk_usage(folder := tempfile.gettempdir()).free < MAX_BYTES:
            raise UserError(f'{where} does not fit into {folder}, where it is unpacked: make room or set TMPDIR to another folder')
        out.write(block)
    out.seek(0)
    return out

def _uncompressed(path):
    "The tar at `path`, open; a compressed one is unpacked into a temporary file"
    import bz2
    import gzip
    import lzma
    with open(path, 'rb') as f: begin = f.read(6)
    for magic,module in ((b'\x1f\x8b', gzip), (b'BZh', bz2), (b'\xfd7zXZ\x00', lzma)):
        if begin.startswith(magic):
            with module.open(path) as f: return unpacked(f, path.stat().st_size, path)
    return open(path, 'rb')

PARTS = (*ARRAYS, '.csv', '.json') # endings of files that hold a part of a data set, and whose folder holds the rest

def open_tree(path):
    """The `Folder`, `Zip`, `Tar` or `ClassTars` at `path`; UserError if there is none

    A pickle, an array, a parquet file, a CSV or a JSON file stands for its folder.
    """
    try: there = (path := Path(path).expanduser()).exists()
    except (OSError, RuntimeError, ValueError, TypeError): there = False
    if not there: raise UserError(f'no such file or folder: {path}; give --data a folder, an archive or a file of data/README.md')
    if path.is_dir(): tree = Folder(path)
    elif not path.is_file(): raise UserError(f'{path} is neither a folder nor a regular file: unpack the data and give its folder')
    elif path.suffix.lower() in PARTS: tree = Folder(path.parent, deep=path.suffix.lower() in ('.csv', '.json'))
    elif zipfile.is_zipfile(path): tree = Zip(path)
    else:
        try: is_tar = tarfile.is_tarfile(path)
        except Exception as e: # a damaged archive can raise any error
            raise UserError(f'{path} is not a whole archive ({first_line(e)}): fetch it again') from None
        if not is_tar: raise UserError(f'{path} is neither a folder, a zip nor a tar archive: unpack it and give its folder')
        tree = Tar(path)
    return tree if path.is_file() and path.suffix.lower() in PARTS else of_tars(tree)

def of_tars(tree):
    "The tree of the tars in a tree, or the tree itself if it has images in folders, arrays or lists, or no tars"
    tars = [f for f in tree.files if TAR.search(f)]
    if not tars or any('/' in f and IMAGES.search(f) or f.lower().endswith(PARTS) for f in tree.files): return tree
    if len(tars) > 1: return ClassTars(tree)
    return Tar(tree.path/tars[0], within=(tree, tars[0])) if isinstance(tree, Tar) else Tar(tree.path/tars[0], tree.opened(tars[0]))
