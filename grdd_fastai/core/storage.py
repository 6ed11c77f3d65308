"""Files on disk: atomic writes, tensors and memory-mapped arrays with a verified checksum, locks and output folders."""
import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from safetensors.torch import load, save

from .errors import UserError, first_line, reason

__all__ = ['Busy', 'user_path', 'atomic_write', 'write_json', 'read_bytes', 'read_json', 'read_safetensors', 'on_cpu', 'digest',
           'save_tensors', 'load_tensors', 'check_state', 'load_state', 'new_memmap', 'filled_array', 'load_array', 'locked',
           'output_folder', 'default_cache']


MAX_BYTES = 2**28 # the most bytes of a file that is read as a whole
MAX_SIDE = 1024 # largest side, in pixels, of packed images and of the images that a network may ask for
NOFOLLOW,NONBLOCK = getattr(os, 'O_NOFOLLOW', 0),getattr(os, 'O_NONBLOCK', 0) # Windows has neither flag
HALF_WRITTEN = re.compile(r'\..+\.[0-9a-f]{16}\.part', re.DOTALL) # matches the names that `part_name` makes


class Busy(UserError):
    "Another process or thread holds a lock"


def user_path(path, what='the path'):
    "Replace ~ in the path that a user gave by the home folder; raise UserError if no file can have that name"
    try:
        if '\0' in str(path): raise ValueError('it holds a null character')
        found = Path(path).expanduser()
        found.exists() # raises OSError if the name is too long
        return found
    except (RuntimeError, ValueError, OSError, TypeError) as e:
        raise UserError(f'{what} {path!r} cannot be used ({reason(e)}): give another') from None


# ---- reading and writing ----------------------------------------------------------------------------------------------

def part_name(path):
    "A hidden, random name beside `path` for a file or folder that is still being written"
    return path.with_name(f'.{path.name}.{secrets.token_hex(8)}.part')

def temporary(path):
    "Make a new, empty file beside `path`; return its name and the file object, open for writing"
    tmp = part_name(path)
    return tmp,os.fdopen(os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NOFOLLOW, 0o666), 'wb')

def sweep(folder, name=''):
    """Remove the half-written files that killed processes left in `folder`, or only those of the file `name`

    The caller must hold the folder's lock.
    """
    for f in folder.iterdir():
        if not (f.name.startswith(f'.{name}') and HALF_WRITTEN.fullmatch(f.name)): continue
        if f.is_dir() and not f.is_symlink(): shutil.rmtree(f, ignore_errors=True)
        else: f.unlink(missing_ok=True)

def atomic_write(path, content):
    "Write bytes or text to `path`; a crash at any moment leaves either the old file or the new one"
    path = Path(path)
    tmp = None
    try:
        tmp,f = temporary(path)
        with f:
            f.write(content if isinstance(content, bytes) else content.encode())
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        sync_folder(path.parent)
    except OSError as e:
        if tmp:
            with contextlib.suppress(OSError): tmp.unlink(missing_ok=True)
        if not path.parent.exists(): raise UserError(f'{path} cannot be written (its folder is gone): start again in another') from None
        raise UserError(f'{path} cannot be written ({e.strerror}): make room or give another folder; what was there is kept') from None

def sync_folder(folder):
    "Flush the names of the files in `folder` to disk, so that a rename survives a power failure"
    if os.name != 'posix': return
    fd = os.open(folder, os.O_RDONLY)
    try: os.fsync(fd)
    finally: os.close(fd)

def write_json(path, obj):
    "Write an object to `path` as indented JSON, with `atomic_write`"
    atomic_write(path, json.dumps(obj, indent=1, default=str) + '\n')


def read_bytes(path, limit=MAX_BYTES, first=-1):
    """Read a regular file of at most `limit` bytes, or only its `first` bytes

    Anything else raises OSError at once: reading a pipe or a device might never end.
    """
    fd = os.open(path, os.O_RDONLY | NONBLOCK)
    with open(fd, 'rb') as f:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, 'it is a folder' if stat.S_ISDIR(about.st_mode) else 'it is not a regular file')
        if about.st_size > limit: raise OSError(errno.EFBIG, f'it has {about.st_size >> 20} MiB, more than the {limit >> 20} that are read')
        return f.read(first)

def read_json(path, default=None, keys=None):
    """Read the JSON object in the file at `path` as a dict; return `default` if there is no such file

    UserError is raised if the file is missing and there is no `default`, if it holds no JSON object, or if one of `keys`
    (name -> type or union of types) is missing or has another type.
    """
    def no_number(text): raise ValueError(f'{text} is no JSON') # Python's parser takes NaN and Infinity for numbers
    try:
        found = json.loads(read_bytes(path, 2**26), parse_constant=no_number)
        if not isinstance(found, dict): raise ValueError('it is not a JSON object')
        for k,kind in (keys or {}).items():
            if isinstance(found.get(k), kind) and (kind is bool or not isinstance(found.get(k), bool)): continue
            name = getattr(kind, '__name__', 'such value')
            raise ValueError(f'{k} is missing or no {name}')
        return found
    except FileNotFoundError:
        if default is not None: return default
        raise UserError(f'{path} is not there: take it from a copy, or give another folder') from None
    except RecursionError: why = 'it is nested too deeply'
    except OSError as e: why = e.strerror
    except ValueError as e: why = first_line(e)
    raise UserError(f'{path} is damaged ({why}): remove it, or take it from a copy')


def read_safetensors(path, header_only=False):
    """Read (tensors, metadata) of a safetensors file; with `header_only` the tensors have shapes but no memory

    The bytes are read here because the safetensors library cannot open a file whose name is not UTF-8.
    Any other file raises OSError or ValueError.
    """
    size = 8 + int.from_bytes(read_bytes(path, 2**40, 8), 'little')
    if size > 2**26: raise ValueError('its header is too long')
    header = json.loads(read_bytes(path, 2**40, size)[8:])
    metadata = header.pop('__metadata__', {})
    if header_only:
        kinds = {k:torch.float32 if v['dtype'].startswith(('F', 'BF')) else torch.int64 for k,v in header.items()}
        return {k:torch.empty(v['shape'], dtype=kinds[k], device='meta') for k,v in header.items()},metadata
    return load(read_bytes(path, 2**40)),metadata

def on_cpu(tensors):
    "Copies of named tensors that are detached, contiguous and on the CPU, where they are not so already"
    return {k:v.detach().cpu().contiguous() for k,v in tensors.items()}

def digest(tensors, text=''):
    "SHA-256 of named tensors and a text, the same for any order of the names"
    h = hashlib.sha256(text.encode())
    for k,v in sorted(on_cpu(tensors).items()):
        h.update(repr((k, str(v.dtype), tuple(v.shape))).encode())
        h.update(v.reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()

def save_tensors(path, tensors, meta):
    "Write named tensors and a JSON-able `meta` to one safetensors file with a checksum; the same content gives the same bytes"
    text = json.dumps(meta, sort_keys=True)
    tensors = on_cpu(tensors)
    header = json.dumps(dict(meta=text, sha256=digest(tensors, text)), sort_keys=True)
    atomic_write(path, save(tensors, metadata=dict(grdd=header))) # safetensors orders several keys at random

def load_tensors(path):
    "Read (tensors, meta) as `save_tensors` wrote them; raise UserError unless the file is whole and its checksum right"
    path = Path(path)
    if not path.is_file(): raise UserError(f'no such file: {path}')
    try:
        tensors,metadata = read_safetensors(path)
        header = json.loads(metadata['grdd'])
        text,sha256 = header['meta'],header['sha256']
        if digest(tensors, text) != sha256: raise ValueError('its checksum is wrong')
        if not isinstance(meta := json.loads(text), dict): raise ValueError('it has no meta')
        return tensors,meta
    except Exception as e: raise UserError(f'{path} is damaged or not ours ({first_line(e)}): remove it or take it from a copy') from None


def check_state(model, tensors, where):
    "Raise UserError, which names the file `where`, unless `tensors` fit `model` in their names, shapes and kinds of numbers"
    own = model.state_dict()
    both = [(k, tensors[k], v) for k,v in own.items() if k in tensors]
    wrong = [f'{k} is missing' for k in own if k not in tensors]
    wrong += [f'{k} is not a tensor of the network' for k in tensors if k not in own]
    wrong += [f'{k} has the shape {tuple(t.shape)}, not {tuple(v.shape)}' for k,t,v in both if t.shape != v.shape]
    wrong += [f'{k} holds {t.dtype}, not {v.dtype}' for k,t,v in both if t.is_floating_point() != v.is_floating_point()]
    if not wrong: return
    more = f', and {len(wrong)-1} more' if wrong[1:] else ''
    raise UserError(f'{where} does not fit the network ({wrong[0]}{more}): it belongs to another network: give the file of this one')

def load_state(model, tensors, where):
    "Load `tensors` into `model` after `check_state`"
    check_state(model, tensors, where)
    model.load_state_dict(tensors)


def new_memmap(path, shape, dtype):
    "Make a .npy memory map and reserve its disk space at once, so that a full disk is an error here instead of a crash later"
    memmap = np.lib.format.open_memmap(path, 'w+', dtype, shape)
    if hasattr(os, 'posix_fallocate'):
        with open(path, 'r+b') as f: os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))
    return memmap

@contextlib.contextmanager
def filled_array(path, shape, dtype, meta):
    """Yield a memory-mapped array to be filled

    The array gets its name `path` when the block ends, and a .json file beside it holds `meta` and the checksum.
    """
    path = Path(path)
    tmp = None
    try:
        tmp,f = temporary(path)
        f.close()
        array = new_memmap(tmp, shape, dtype)
        yield array
        array.flush()
        os.replace(tmp, path)
        write_json(path.with_suffix('.json'), dict(meta=meta, sha256=_file_digest(path)))
    except OSError as e: raise UserError(f'{path} cannot be written ({e.strerror}): make room or give another folder') from None
    finally:
        if tmp: tmp.unlink(missing_ok=True)

def load_array(path):
    """Read (array, meta) as `filled_array` wrote them; raise UserError unless the file is whole

    The array is memory-mapped. Changes to it stay in memory.
    """
    path = Path(path)
    try:
        about = read_json(path.with_suffix('.json'), keys=dict(sha256=str, meta=dict))
        if not path.is_file() or about['sha256'] != _file_digest(path): raise ValueError('its checksum is wrong')
        return np.load(path, mmap_mode='c'),about['meta']
    except (OSError, ValueError) as e: raise UserError(f'{path} is not there, damaged or not ours ({e}): remove it') from None

def _file_digest(path):
    "SHA-256 of a file's content"
    h = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(2**20): h.update(block)
    return h.hexdigest()


# ---- locks and output folders -----------------------------------------------------------------------------------------

def check_lock(path):
    """Make the lock file `path` if there is none; raise UserError if something else than a regular file has that name

    filelock refuses links too. It does not refuse pipes. It makes missing folders, and it waits for ever in a folder such as /proc, which
    takes no files and reports each new one as missing. Making the file here raises OSError in both cases.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode): raise UserError(f'{path} is a link, and a lock never is: remove it')
        if not stat.S_ISREG(mode): raise UserError(f'{path} is not a regular file, as a lock is: remove it')
    try: os.close(os.open(path, os.O_RDWR | os.O_CREAT | NOFOLLOW | NONBLOCK, 0o666))
    except PermissionError:
        if os.name == 'posix': raise # Windows denies access to a lock file that is just being removed, which filelock waits for

@contextlib.contextmanager
def locked(path, busy=None):
    """Hold the lock file `path` against other processes and threads

    The lock is waited for. If the sentence `busy` is given, `Busy` is raised with it instead. A process that dies loses its locks.
    """
    path = Path(path)
    lock = FileLock(path, blocking=not busy, thread_local=False, fallback_to_soft=False)
    try:
        check_lock(path)
        lock.acquire()
    except Timeout: raise Busy(busy) from None
    except OSError as e: raise UserError(f'{path.parent} cannot be written ({reason(e)}): give another folder') from None
    try: yield
    finally: lock.release()

@contextlib.contextmanager
def output_folder(path, flag='--out'):
    """Make the folder `path` and check that it takes files before any work is done for it; raise UserError if it does not

    Folders that were made here are removed at the end if nothing was written to them.
    """
    if not str(path).strip(): raise UserError(f'{flag} is empty: give it the name of a folder')
    folder = user_path(path, flag)
    made = [f for f in (folder, *folder.parents) if not os.path.lexists(f)]
    room = None
    try:
        try:
            for attempt in range(20):
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    room,f = temporary(folder/'room') # this file stays until the end, so that no other process removes the folder as empty
                    break
                except FileNotFoundError: # another process made the folder, did not use it and has just removed it
                    if attempt == 19: raise
            with f:
                f.write(bytes(2**16))
                f.flush()
                os.fsync(f.fileno())
        except (OSError, ValueError) as e:
            raise UserError(f'the folder {folder} cannot be written ({reason(e)}): give {flag} another') from None
        yield folder
    finally:
        with contextlib.suppress(OSError):
            if room: room.unlink(missing_ok=True) # the holder of the folder's lock may have swept it away
            if folder in made and {f.name for f in folder.iterdir()} == {'.lock'}: (folder/'.lock').unlink()
            for f in made: f.rmdir()


def default_cache():
    "The user's cache folder of this library: $XDG_CACHE_HOME/grdd_fastai or ~/.cache/grdd_fastai on Linux"
    return user_cache_path('grdd_fastai', appauthor=False)
