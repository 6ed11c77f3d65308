"""The origin of a number: command, commit, device, versions and time, and the log of all scorings of the novel classes."""
import contextlib
import datetime
import hashlib
import inspect
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
    "Commit of the checkout that this package runs from, with '+' if its code has changed since; None outside a checkout"
    def git(*args):
        return subprocess.run(['git', '-C', PACKAGE, *args], capture_output=True, text=True, check=True).stdout.strip()
    try:
        git('ls-files', '--error-unmatch', '__init__.py') # fails for a package that is installed inside another project's repository
        commit = git('rev-parse', 'HEAD')
        changed = git('status', '--porcelain', '--untracked-files=no', '--', '.', '../recipes', '../pyproject.toml')
        return commit + ('+' if changed else '')
    except (OSError, subprocess.CalledProcessError): return None

@cache
def device_name():
    "Name of the GPU if there is one, else of the processor"
    if torch.cuda.is_available(): return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, StopIteration):
        return next(line for line in open('/proc/cpuinfo') if line.startswith('model name')).split(':', 1)[1].strip()
    return platform.processor() or platform.machine()

def versions():
    "Versions of this package and of the packages that its numbers depend on"
    return dict(grdd_fastai=__version__) | {k:version(k) for k in ('torch','torchvision','timm','fastai','albumentations','pandas','numpy')}

def command(words=None):
    "The command line `words`, by default this process's, as text for others: paths outside the working folder are reduced to names"
    return shlex.join(['python', *map(public_word, sys.argv if words is None else words)])

def public_word(word):
    """A word of a command line in which a path that leads out of the working folder is reduced to its name

    The name of a recipe or a benchmark keeps its folder, `recipes/` or `benchmarks/`.
    """
    flag,eq,value = word.partition('=') if word.startswith('--') else ('', '', word)
    def shown(piece):
        path = posixpath.normpath(piece.replace('\\', '/')) if re.search(r'[/\\]|^~', piece) else ''
        if not re.match(r'/|\.\.(/|$)|~|file:|[A-Za-z]:', path): return piece
        folder,_,name = path.rpartition('/')
        if not folder.endswith(('/recipes', '/benchmarks')): return name
        return folder.rpartition('/')[2] + '/' + name
    return flag + eq + ','.join(map(shown, value.split(',')))

def now():
    "The time in UTC, in ISO format"
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')

def origin(data):
    "Where a record of numbers on `data` (`FewShotData`) comes from: a dict for JSON"
    return dict(data=dict(name=data.name, fingerprint=data.fingerprint), command=command(), commit=git_commit(), device=device_name(),
                versions=versions(), time=now())

def log_line(path, scoring):
    """Append the dict `scoring`, a scoring of the novel classes, to the JSON lines at `path` unless it is there already

    UserError if the file cannot be written.
    """
    path = Path(path)
    line = json.dumps(scoring, sort_keys=True) + '\n'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and line in read_bytes(path).decode(errors='replace').splitlines(keepends=True): return
        with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NOFOLLOW, 0o666), 'a') as f: f.write(line)
    except OSError as e: raise UserError(f'{path} cannot be written ({e.strerror}): make room or give another folder') from None

def of_class(method):
    "The arguments `own` of a class or a `partial` of one, and a checksum of its code if it does not belong to the package"
    cls = getattr(method, 'func', method)
    defaults = {k:p.default for k,p in inspect.signature(cls).parameters.items() if p.default is not p.empty}
    found = dict(own=defaults | getattr(method, 'keywords', {}))
    if not cls.__module__.startswith('grdd_fastai.'):
        with contextlib.suppress(OSError, TypeError): found['code'] = hashlib.sha256(inspect.getsource(cls).encode()).hexdigest()[:16]
    return found
