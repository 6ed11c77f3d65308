"""Files that are whole or not there: atomic writes, tensors and memory-mapped arrays with a verified checksum, one run a folder."""
import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from .errors import UserError

try:
    import fcntl
except ImportError: # Windows: no locks
    fcntl = None

__all__ = ['Busy', 'atomic_write', 'write_json', 'on_cpu', 'digest', 'save_tensors', 'load_tensors', 'new_memmap', 'filled_array', 'load_array', 'locked']


class Busy(UserError):
    "Another process holds a lock"


def atomic_write(path, content):
    "Write bytes or text to `path` so that a crash at any moment leaves the old file or the new one"
    path = Path(path)
    tmp = path.with_name(f'.{path.name}.part')
    try:
        with open(tmp, 'wb') as f:
            f.write(content if isinstance(content, bytes) else content.encode())
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        sync_folder(path.parent)
    except OSError as e:
        with contextlib.suppress(OSError): tmp.unlink(missing_ok=True)
        raise UserError(f'{path} cannot be written ({e.strerror}): make room or give another folder; what was there is kept') from None

def sync_folder(folder):
    "Make renames in `folder` last"
    if os.name != 'posix': return
    fd = os.open(folder, os.O_RDONLY)
    try: os.fsync(fd)
    finally: os.close(fd)

def write_json(path, obj): atomic_write(path, json.dumps(obj, indent=1, default=str) + '\n')


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
        with safe_open(path, 'pt') as f:
            header = json.loads((f.metadata() or {})['grdd'])
            tensors = {k:f.get_tensor(k) for k in f.keys()} # noqa: SIM118  (no mapping)
        text,sha256 = header['meta'],header['sha256']
        if digest(tensors, text) != sha256: raise ValueError('its checksum is wrong')
        return tensors,json.loads(text)
    except Exception as e: raise UserError(f'{path} is damaged or not ours ({e}): remove it or take it from a copy') from None


def new_memmap(path, shape, dtype):
    "A .npy memory map whose room on the disk is taken now: a full disk is an error here, not a crash later"
    memmap = np.lib.format.open_memmap(path, 'w+', dtype, shape)
    if hasattr(os, 'posix_fallocate'):
        with open(path, 'r+b') as f: os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))
    return memmap

@contextlib.contextmanager
def filled_array(path, shape, dtype, meta):
    "Fill a memory-mapped array inside; after it the array is at `path`, with `meta` and its checksum beside it as .json"
    path = Path(path)
    tmp = path.with_name(f'.{path.name}.part')
    try:
        array = new_memmap(tmp, shape, dtype)
        yield array
        array.flush()
        os.replace(tmp, path)
        write_json(path.with_suffix('.json'), dict(meta=meta, sha256=_file_digest(path)))
    except OSError as e: raise UserError(f'{path} cannot be written ({e.strerror}): make room or give another folder') from None
    finally: tmp.unlink(missing_ok=True)

def load_array(path):
    "(array, meta) of `filled_array`, memory-mapped; changes to the array stay in memory; UserError unless it is whole"
    path = Path(path)
    try:
        about = json.loads(path.with_suffix('.json').read_text())
        if about['sha256'] != _file_digest(path): raise ValueError('its checksum is wrong')
        return np.load(path, mmap_mode='c'),about['meta']
    except (OSError, ValueError, KeyError, TypeError) as e: raise UserError(f'{path} is not there, damaged or not ours ({e}): remove it') from None

def _file_digest(path):
    h = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(2**20): h.update(block)
    return h.hexdigest()


@contextlib.contextmanager
def locked(path, busy=None):
    "Hold the lock file `path`; wait for its holder, or raise UserError(`busy`). A dead process holds nothing"
    if fcntl is None:
        yield
        return
    try: f = open(path, 'a')
    except OSError as e: raise UserError(f'{Path(path).parent} cannot be written ({e.strerror}): give another folder') from None
    with f:
        try: fcntl.flock(f, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError: raise Busy(busy) from None
        yield
