"""Where a number comes from: command, commit, device, versions, time, and the log of the novel classes."""
import contextlib
import datetime
import json
import os
import platform
import posixpath
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from .. import __version__
from ..core.errors import UserError
from ..core.storage import NOFOLLOW, read_bytes

__all__ = ['git_commit', 'device_name']


PACKAGE = Path(__file__).parent.parent


@cache
def git_commit():
    "Commit of the checkout this package runs from, '+' if its code was changed since; None outside one"
    def git(*args):
        return subprocess.run(['git', '-C', PACKAGE, *args], capture_output=True, text=True, check=True).stdout.strip()
    try:
        git('ls-files', '--error-unmatch', '__init__.py') # not somebody's repository around an installed package
        return (git('rev-parse', 'HEAD') +
                ('+' if git('status', '--porcelain', '--untracked-files=no', '--', '.', '../recipes', '../pyproject.toml') else ''))
    except (OSError, subprocess.CalledProcessError): return None

@cache
def device_name():
    "The GPU's name, else the processor's"
    if torch.cuda.is_available(): return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, StopIteration):
        return next(line for line in open('/proc/cpuinfo') if line.startswith('model name')).split(':', 1)[1].strip()
    return platform.processor() or platform.machine()

def versions():
    return dict(grdd_fastai=__version__) | {k:version(k) for k in ('torch','torchvision','timm','fastai','albumentations','pandas','numpy')}

def command(words=None):
    "A command line (this process's), for those who want its numbers again: files by their names, not by where they lie on this machine"
    return shlex.join(['python', *map(public, sys.argv if words is None else words)])

def public(word):
    "A word of a command line; of a path that leads out of the working folder only the name, and of a recipe's `recipes/` before it"
    flag,eq,value = word.partition('=') if word.startswith('--') else ('', '', word)
    def shown(piece):
        path = posixpath.normpath(piece.replace('\\', '/')) if re.search(r'[/\\]|^~', piece) else ''
        if not re.match(r'/|\.\.(/|$)|~|file:|[A-Za-z]:', path): return piece
        folder,_,name = path.rpartition('/')
        return f'{folder.rpartition("/")[2]}/{name}' if folder.endswith(('/recipes', '/benchmarks')) else name
    return flag + eq + ','.join(map(shown, value.split(',')))

def now(): return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')

def log_line(path, scoring):
    "Append a scoring of the novel classes to the JSON lines at `path`, if it is not there already"
    path,line = Path(path),json.dumps(scoring, sort_keys=True) + '\n'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and line in read_bytes(path).decode(errors='replace').splitlines(keepends=True): return
        with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NOFOLLOW, 0o666), 'a') as f: f.write(line)
    except OSError as e: raise UserError(f'{path} cannot be written ({e.strerror}): make room or give another folder') from None
