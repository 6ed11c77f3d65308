"""Files that are whole or not there: atomic writes, tensors and memory-mapped arrays with a verified checksum, one run a folder."""
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
from safetensors.torch import load, save

from .errors import UserError, first_line

__all__ = ['Busy', 'user_path', 'atomic_write', 'write_json', 'read_bytes', 'read_json', 'read_safetensors', 'on_cpu', 'digest',
           'save_tensors', 'load_tensors', 'check_state', 'load_state', 'new_memmap', 'filled_array', 'load_array', 'locked',
           'output_folder', 'default_cache']


try:
    import fcntl
except ImportError: # Windows: no locks
    fcntl = None

LARGEST = 2**28 # most bytes of a file that is read as a whole
NOFOLLOW,NONBLOCK = getattr(os, 'O_NOFOLLOW', 0),getattr(os, 'O_NONBLOCK', 0)
HALF_WRITTEN = re.compile(r'\..+\.[0-9a-f]{16}\.part', re.DOTALL) # names of `part_name`


class Busy(UserError):
    "Another process holds a lock"


def user_path(path, what='the path'):
    "The path that a user gave, with ~ replaced by the home folder; UserError if no file can have that name"
    try:
        if '\0' in str(path): raise ValueError('it holds a null character')
        found = Path(path).expanduser()
        found.exists() # raises OSError if the name is too long
        return found
    except (RuntimeError, ValueError, OSError, TypeError) as e:
        raise UserError(f'{what} {path!r} cannot be used ({getattr(e, "strerror", None) or e}): give another') from None


# ---- reading and writing ----------------------------------------------------------------------------------------------

def part_name(path):
    "A hidden name beside `path` that nobody can foretell, for what is half written"
    return path.with_name(f'.{path.name}.{secrets.token_hex(8)}.part')

def temporary(path):
    "Make a new, empty file beside `path`; return its name and the file, open for writing"
    tmp = part_name(path)
    return tmp,os.fdopen(os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NOFOLLOW, 0o666), 'wb')

def sweep(folder, name=''):
    "Remove the half-written files that killed processes left in `folder`, of `name` if it is given; the caller holds the lock"
    for f in folder.iterdir():
        if not (f.name.startswith(f'.{name}') and HALF_WRITTEN.fullmatch(f.name)): continue
        if f.is_dir() and not f.is_symlink(): shutil.rmtree(f, ignore_errors=True)
        else: f.unlink(missing_ok=True)

def atomic_write(path, content):
    "Write bytes or text to `path` so that a crash at any moment leaves the old file or the new one"
    path,tmp = Path(path),None
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
        raise UserError(f'{path} cannot be written (its folder is gone): start again in another' if not path.parent.exists() else
                        f'{path} cannot be written ({e.strerror}): make room or give another folder; what was there is kept') from None

def sync_folder(folder):
    "Make renames in `folder` last"
    if os.name != 'posix': return
    fd = os.open(folder, os.O_RDONLY)
    try: os.fsync(fd)
    finally: os.close(fd)

def write_json(path, obj): atomic_write(path, json.dumps(obj, indent=1, default=str) + '\n')


def read_bytes(path, limit=LARGEST, first=-1):
    """The content of a regular file of at most `limit` bytes, or its `first` bytes

    OSError for anything else that has a name: a pipe or a device would never end, and neither is waited for.
    """
    fd = os.open(path, os.O_RDONLY | NONBLOCK)
    with open(fd, 'rb') as f:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, 'it is a folder' if stat.S_ISDIR(about.st_mode) else 'it is not a regular file')
        if about.st_size > limit: raise OSError(errno.EFBIG, f'it has {about.st_size >> 20} MiB, more than the {limit >> 20} that are read')
        return f.read(first)

def read_json(path, default=None, keys=None):
    """The JSON object in the file at `path`, as a dict; `default` where there is no such file

    UserError if the file is missing without a `default`, if it is no JSON object, or if one of `keys` (name -> type or types) is missing
    or of another type.
    """
    def no_number(text): raise ValueError(f'{text} is no JSON')
    try:
        found = json.loads(read_bytes(path, 2**26), parse_constant=no_number)
        if not isinstance(found, dict): raise ValueError('it is not a JSON object')
        for k,kind in (keys or {}).items():
            if not isinstance(found.get(k), kind) or (kind is not bool and isinstance(found.get(k), bool)):
                raise ValueError(f'{k} is missing or no {getattr(kind, "__name__", "such value")}')
        return found
    except FileNotFoundError:
        if default is not None: return default
        raise UserError(f'{path} is not there: take it from a copy, or give another folder') from None
    except RecursionError: why = 'it is nested too deeply'
    except OSError as e: why = e.strerror
    except ValueError as e: why = first_line(e)
    raise UserError(f'{path} is damaged ({why}): remove it, or take it from a copy')


def read_safetensors(path, header_only=False):
    """(tensors, metadata) of a safetensors file; with `header_only` the tensors have shapes but no memory

    Read by us, since the library does not open a file whose name is not UTF-8. OSError or ValueError for what is no such file.
    """
    size = 8 + int.from_bytes(read_bytes(path, 2**40, 8), 'little')
    if size > 2**26: raise ValueError('its header is too long')
    header = json.loads(read_bytes(path, 2**40, size)[8:])
    metadata = header.pop('__metadata__', {})
    if header_only:
        return {k:torch.empty(v['shape'], dtype=torch.float32 if v['dtype'].startswith(('F', 'BF')) else torch.int64, device='meta')
                for k,v in header.items()},metadata
    return load(read_bytes(path, 2**40)),metadata

def on_cpu(tensors): return {k:v.detach().cpu().contiguous() for k,v in tensors.items()}

def digest(tensors, text=''):
    "SHA-256 of named tensors and a text"
    h = hashlib.sha256(text.encode())
    for k,v in sorted(on_cpu(tensors).items()):
        h.update(repr((k, str(v.dtype), tuple(v.shape))).encode())
        h.update(v.reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()

def save_tensors(path, tensors, meta):
    "Named tensors and a JSON-able `meta` as one safetensors file with its checksum; the same bytes for the same content"
    text = json.dumps(meta, sort_keys=True)
    tensors = on_cpu(tensors)
    header = json.dumps(dict(meta=text, sha256=digest(tensors, text)), sort_keys=True)
    atomic_write(path, save(tensors, metadata=dict(grdd=header))) # one key: safetensors orders several at random

def load_tensors(path):
    "(tensors, meta) of `save_tensors`; UserError unless the file is whole and its checksum right"
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
    "UserError, naming the file `where`, unless `tensors` are exactly those of `model` by name and shape"
    own = model.state_dict()
    wrong = ([f'{k} is missing' for k in own if k not in tensors] + [f'{k} is none of its tensors' for k in tensors if k not in own] +
             [f'{k} has the shape {tuple(tensors[k].shape)}, not {tuple(v.shape)}'
              for k,v in own.items() if k in tensors and tensors[k].shape != v.shape] +
             [f'{k} holds {tensors[k].dtype}, not {v.dtype}'
              for k,v in own.items() if k in tensors and tensors[k].is_floating_point() != v.is_floating_point()])
    if wrong:
        raise UserError(f'{where} does not fit the network ({wrong[0]}' + (f', and {len(wrong)-1} more' if wrong[1:] else '') +
                        '): it is of another, take the right file')

def load_state(model, tensors, where):
    "Load `tensors` into `model` where `check_state` finds that they are its own"
    check_state(model, tensors, where)
    model.load_state_dict(tensors)


def new_memmap(path, shape, dtype):
    "A .npy memory map whose room on the disk is taken now: a full disk is an error here, not a crash later"
    memmap = np.lib.format.open_memmap(path, 'w+', dtype, shape)
    if hasattr(os, 'posix_fallocate'):
        with open(path, 'r+b') as f: os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))
    return memmap

@contextlib.contextmanager
def filled_array(path, shape, dtype, meta):
    "Fill a memory-mapped array inside; after it the array is at `path`, with `meta` and its checksum beside it as .json"
    path,tmp = Path(path),None
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
    "(array, meta) of `filled_array`, memory-mapped; changes to the array stay in memory; UserError unless it is whole"
    path = Path(path)
    try:
        about = read_json(path.with_suffix('.json'), keys=dict(sha256=str, meta=dict))
        if not path.is_file() or about['sha256'] != _file_digest(path): raise ValueError('its checksum is wrong')
        return np.load(path, mmap_mode='c'),about['meta']
    except (OSError, ValueError) as e: raise UserError(f'{path} is not there, damaged or not ours ({e}): remove it') from None

def _file_digest(path):
    h = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(2**20): h.update(block)
    return h.hexdigest()


# ---- folders for one process at a time --------------------------------------------------------------------------------

@contextlib.contextmanager
def locked(path, busy=None):
    """Hold the lock file `path`; wait for its holder, or raise `Busy` with the sentence `busy`. A dead process holds nothing

    A link by that name is refused.
    """
    if fcntl is None:
        yield
        return
    try: fd = os.open(path, os.O_RDWR | os.O_CREAT | NOFOLLOW | NONBLOCK, 0o666)
    except OSError as e:
        if e.errno == errno.ELOOP: raise UserError(f'{path} is a link, and a lock never is: remove it') from None
        raise UserError(f'{Path(path).parent} cannot be written ({e.strerror}): give another folder') from None
    with open(fd, 'rb'):
        if not stat.S_ISREG(os.fstat(fd).st_mode): raise UserError(f'{path} is not a regular file, as a lock is: remove it')
        try: fcntl.flock(fd, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError: raise Busy(busy) from None
        yield

@contextlib.contextmanager
def output_folder(path, flag='--out'):
    """The folder at `path`, which is made, and shown to take files before any work is done for it

    What was made goes again at the end if nothing was written there. UserError where nothing can be written.
    """
    if not str(path).strip(): raise UserError(f'{flag} is empty: give it the name of a folder')
    folder = user_path(path, f'{flag}')
    made,room = [f for f in (folder, *folder.parents) if not os.path.lexists(f)],None
    try:
        try:
            for attempt in range(20):
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    room,f = temporary(folder/'room') # stays until the end, so that no other process takes the folder for an empty one
                    break
                except FileNotFoundError: # another process has just removed the folder, which it had made and not used
                    if attempt == 19: raise
            with f:
                f.write(bytes(2**16))
                f.flush()
                os.fsync(f.fileno())
        except (OSError, ValueError) as e:
            raise UserError(f'the folder {folder} cannot be written ({getattr(e, "strerror", None) or e}): give {flag} another') from None
        yield folder
    finally:
        with contextlib.suppress(OSError):
            if room: room.unlink(missing_ok=True) # whoever holds the folder's lock may have swept it
            if folder in made and {f.name for f in folder.iterdir()} == {'.lock'}: (folder/'.lock').unlink()
            for f in made: f.rmdir()
LARGEST_SIDE = 1024 # of packed images, and of those a network may ask for


def default_cache():
    "$XDG_CACHE_HOME/grdd_fastai, or ~/.cache/grdd_fastai"
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home()/'.cache')/'grdd_fastai'
