"""A run's folder: settings, versions, histories, checkpoints, weights and the result of one recipe."""
import contextlib
import datetime
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from fastai.callback.core import Callback
from safetensors.torch import load_file, save

from .checkpoint import Checkpoint, Deadline, SkipBatches, StopOnNaN, load_checkpoint, previous
from .distributed import ranks, replica, shared
from .errors import UserError
from .storage import Busy, atomic_write, digest, locked, on_cpu, write_json

__all__ = ['Run', 'git_commit', 'device_name', 'save_weights', 'load_weights', 'deterministic']

STAGES = ('student_cl', 'teacher', 'student_grdd', 'net')


@cache
def git_commit():
    "Commit of the checkout this package runs from, '+' if its code was changed since; None outside one"
    def git(*args): return subprocess.run(['git', '-C', Path(__file__).parent, *args], capture_output=True, text=True, check=True).stdout.strip()
    try:
        git('ls-files', '--error-unmatch', Path(__file__).name) # not somebody's repository around an installed package
        return git('rev-parse', 'HEAD') + ('+' if git('status', '--porcelain', '--untracked-files=no', '--', '.', '../recipes', '../pyproject.toml') else '')
    except (OSError, subprocess.CalledProcessError): return None

@cache
def device_name():
    "The GPU's name, else the processor's"
    if torch.cuda.is_available(): return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, StopIteration):
        return next(line for line in open('/proc/cpuinfo') if line.startswith('model name')).split(':', 1)[1].strip()
    return platform.processor() or platform.machine()

def say(text):
    if ranks()[0] == 0: print(text, file=sys.stderr, flush=True)

def versions(): return {k:version(k) for k in ('torch','torchvision','timm','fastai','albumentations','pandas','numpy')}

def now(): return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')

def log_line(path, scoring):
    "Append a scoring of the novel classes to the JSON lines at `path`, if it is not there already"
    path,line = Path(path),json.dumps(scoring, sort_keys=True) + '\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and line in path.read_text().splitlines(keepends=True): return
    with open(path, 'a') as f: f.write(line)

def save_weights(model, path, **card):
    "`model` as `path`.safetensors, the same bytes for the same weights, and `card` with their checksum as `path`.json"
    tensors = on_cpu(model.state_dict())
    atomic_write(f'{path}.safetensors', save(tensors, metadata=dict(format='pt')))
    write_json(f'{path}.json', card | dict(sha256=digest(tensors)))

def load_weights(model, path, without=None):
    "Load `save_weights`' files into `model` and return their card; UserError unless they are whole and fit, but for what begins with `without`"
    try:
        card,tensors = json.loads(Path(f'{path}.json').read_text()),load_file(f'{path}.safetensors')
        if card['sha256'] != digest(tensors): raise ValueError('the checksum is wrong')
        model.load_state_dict({k:v for k,v in tensors.items() if not (without and k.startswith(without))})
    except Exception as e: raise UserError(f'{path}.safetensors and its .json cannot be used ({e}): remove both, or take them from a copy') from None
    return card


@contextlib.contextmanager
def deterministic(on=True):
    "Deterministic kernels inside, where `on`: what CUDA needs to repeat a run to the bit; slower"
    was = torch.are_deterministic_algorithms_enabled(),torch.backends.cudnn.benchmark
    if on:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8') # cuBLAS reads it when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try: yield
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.backends.cudnn.benchmark = was[1]


class History(Callback):
    "The Recorder's table as CSV, whole after each epoch"
    order = 66 # before the checkpoint
    def __init__(self, path): self.path = path
    def after_epoch(self):
        names = [n for n in self.recorder.metric_names if n != 'time']
        rows = [','.join(map(str, [i, *map(float, row)])) for i,row in enumerate(self.recorder.values)]
        atomic_write(self.path, '\n'.join([','.join(names), *rows]) + '\n')


class Run:
    """`with Run(out, settings) as run:` a recipe whose progress goes to stderr and whose result is stdout's last line

    `settings` decide the result; a run is continued only under the same ones. What is finished is kept as files: a stage is
    done when its weights and their card are there, a run when `result.json` says so. `wait`s for another process in the folder,
    or is a UserError. Nothing in the folder is touched before
    `begin`, and nothing that is not a run's own ever. Of several processes the first has the folder, the others a copy for themselves.
    """
    def __init__(self, out, settings, resume=False, max_minutes=None, plan=(), wait=False):
        self.out,self.settings,self.resume,self.stdout,self.plan,self.wait = Path(out).expanduser(),settings,resume,sys.stdout,list(plan),wait
        self.start,self.seconds_before,self.deadline,self.begun = time.monotonic(),0.,Deadline(max_minutes),False

    # ---- the folder ---------------------------------------------------------------------------------------------------

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        try:
            shared(self._take)
            self.out,self.start = replica(self.out) if ranks()[1] > 1 else self.out,time.monotonic()
            self.stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            self.stack.enter_context(deterministic(self.settings.get('deterministic', False)))
            self.stack.enter_context(self.deadline)
            self.result = self._look()
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, kind, error, tb):
        self.stack.close()
        if kind and kind is not SystemExit: print(file=sys.stderr) # end the line a progress bar may have left

    def _take(self):
        "The folder for this process alone"
        try:
            self.made = not self.out.exists()
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as e: raise UserError(f'the output folder {self.out} cannot be written ({e.strerror}): give --out another') from None
        self.stack.callback(self._leave)
        self._lock()

    def _lock(self):
        "At once or, with `wait`, when its holder is done"
        said = False
        while True:
            try: self.stack.enter_context(locked(self.out/'.lock', f'another run is at work in {self.out}: wait for it or give --out another')); return
            except Busy:
                if not self.wait: raise
                if stop := self.deadline.due(): raise stop from None
            if not said: self.say(f'another process is at work in {self.out}: waiting for it')
            said = True
            time.sleep(0.5)

    def _leave(self):
        "A folder made for a run that never began goes"
        if self.made and {p.name for p in self.out.iterdir()} <= {'.lock'}: shutil.rmtree(self.out, ignore_errors=True)

    def _read(self, name):
        try:
            if not isinstance(found := json.loads((self.out/name).read_text()), dict): raise ValueError()
            return found
        except FileNotFoundError: return {}
        except (OSError, ValueError): raise UserError(f'{self.out/name} is damaged: remove it, or give --out another folder') from None

    def _look(self):
        "The finished run's result if this is to be resumed and there is one"
        self.old = self._read('settings.json')
        if self.old and not (isinstance(self.old.get('settings'), dict) and 'torch_threads' in self.old):
            raise UserError(f'{self.out/"settings.json"} is not a run\'s: give --out another folder')
        self.resume = self.resume and bool(self.old)
        if not self.resume:
            if any(self.out.glob('checkpoint_*')):
                raise UserError(f'{self.out} holds an unfinished run: add --resume to go on with it, or give --out another folder')
            return None
        mine = json.loads(json.dumps(self.settings, default=str))
        for k in sorted(mine.keys() | self.old['settings'].keys()):
            a,b = self.old['settings'].get(k),mine.get(k)
            if a != b: raise UserError(f'{self.out} was started with {k}={a}, not {b}: resume with the same settings, or give --out another folder')
        result = self._read('result.json')
        self.seconds_before = result.get('seconds', 0.)
        return result if result.get('status') == 'finished' else None

    def begin(self, data):
        "Start the run's record on `data`, or go on if it began with the same"
        if self.resume:
            began = self._read('data.json').get('fingerprint', data.fingerprint)
            if began != data.fingerprint: raise UserError(
                f'the data changed since {self.out} was started: bring back the data it began with, or give --out another folder')
            if self.old['torch_threads'] != torch.get_num_threads(): self.say(
                f'started with {self.old["torch_threads"]} threads, now {torch.get_num_threads()}: the weights will differ in their last bits')
        else:
            for f in ('result.json', 'data.json', *(f for s in STAGES for f in (f'{s}.safetensors', f'{s}.json', f'history_{s}.csv'))):
                (self.out/f).unlink(missing_ok=True)
            write_json(self.out/'settings.json', dict(
                settings=self.settings, command=shlex.join(['python', *sys.argv]), commit=git_commit(), python=platform.python_version(), cpus=os.cpu_count(),
                torch_threads=torch.get_num_threads(),
                device=device_name(),
                versions=versions()))
        self.begun = True
        write_json(self.out/'data.json', dict(name=data.name, px=data.px, fingerprint=data.fingerprint, stats=data.stats))
        self.say(f'{data}')

    def seconds(self): return round(self.seconds_before + time.monotonic() - self.start, 1)
    def say(self, text): say(text)

    # ---- stages -------------------------------------------------------------------------------------------------------

    def stage(self, name, learn, fit, **card):
        "Fit a Learner, or go on with it, or load what it came to: the network and its best validation accuracy"
        net,path,checkpoint = getattr(learn.model, 'backbone', learn.model),self.out/name,self.out/f'checkpoint_{name}.safetensors'
        if self.resume and Path(f'{path}.json').exists(): best = load_weights(net, path)['val_accuracy']
        else:
            self._fit(name, learn, fit, checkpoint)
            best = learn.keep_best.best
            save_weights(net, path, **card, val_accuracy=best)
        for f in (checkpoint, previous(checkpoint)): f.unlink(missing_ok=True)
        self.plan.remove(name)
        return net,best

    def _fit(self, name, learn, fit, checkpoint):
        state = load_checkpoint(checkpoint, self.say) if self.resume else None
        if state:
            self.seconds_before = max(self.seconds_before, state[1]['seconds'])
            self.say(f'{name} goes on at epoch {state[1]["epoch"]}, step {state[1]["step"]}')
        learn.add_cbs([SkipBatches(), History(self.out/f'history_{name}.csv'), StopOnNaN(name),
                       Checkpoint(checkpoint, lambda: dict(stage=name, seconds=self.seconds()), self.deadline, resume=state)])
        def log(row): self.say('  '.join(f'{k} {v:.4f}' if isinstance(v, float) else f'{k} {v}'
                                         for k,v in zip(learn.recorder.metric_names, row)))
        self.deadline.fitting = True
        try:
            with learn.distrib_ctx():
                if sys.stderr.isatty() and ranks()[0] == 0: return fit(learn)
                learn.logger = log # no bars in a log file: a line an epoch
                with learn.no_bar(): fit(learn)
        finally: self.deadline.fitting = False

    # ---- results ------------------------------------------------------------------------------------------------------

    def finish(self, **result):
        "Write `result.json` and print it as stdout's last line"
        return self._report(result | dict(seconds=self.seconds(), status='finished'))

    def stopped(self, stop):
        "Say what is left, write it to `result.json`; a signal's exit code goes to the shell"
        left = ', '.join([self.plan[0] + stop.where, *self.plan[1:]])
        self.say(f'stopped ({stop}): left to do are {left}; --resume goes on')
        result = self.settings | dict(seconds=self.seconds(), status='stopped', left=left)
        self._report(result) if self.begun else self.print(result)
        if stop.code: sys.exit(stop.code)
        return result

    def _report(self, result):
        write_json(self.out/'result.json', result := _plain(result))
        return self.print(result)
    def print(self, result):
        if ranks()[0] == 0: print(json.dumps(result, default=str), file=self.stdout, flush=True)
        return result

    def log_novel(self, **scoring):
        "Append a scoring of the novel classes to the run's record"
        log_line(self.out/'novel_scorings.jsonl', dict(time=now(), commit=git_commit(), **scoring))

def _plain(result): return {k:None if isinstance(v, float) and not math.isfinite(v) else v for k,v in result.items()} # JSON has no NaN
