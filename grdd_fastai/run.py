"""A run's folder: settings, versions, histories, weights and results of one recipe."""
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from fastai.callback.progress import CSVLogger
from safetensors.torch import save_file

from .errors import UserError

__all__ = ['Run', 'git_commit', 'save_weights']


def git_commit():
    "Commit of the checkout this package runs from, '+' if it was changed since; None outside one"
    def git(*args): return subprocess.run(['git', '-C', Path(__file__).parent, *args], capture_output=True, text=True, check=True).stdout.strip()
    try: return git('rev-parse', 'HEAD') + ('+' if git('status', '--porcelain', '--untracked-files=no') else '')
    except (OSError, subprocess.CalledProcessError): return None

def _write(path, text):
    tmp = path.with_name(path.name+'.part')
    tmp.write_text(text)
    os.replace(tmp, path)

def save_weights(model, path, **meta):
    "Write `model` to `path`.safetensors with `meta` (architecture, classes, statistics, ...) as JSON beside it"
    tensors = {k:v.detach().cpu().contiguous() for k,v in model.state_dict().items()}
    tmp = Path(f'{path}.safetensors.part')
    save_file(tensors, tmp, metadata=dict(format='pt'))
    os.replace(tmp, f'{path}.safetensors')
    _write(Path(f'{path}.json'), json.dumps(meta, indent=1))


class Run:
    "`with Run(out, settings) as run:` a recipe whose progress goes to stderr and whose result is stdout's last line"
    def __init__(self, out, settings):
        self.out,self.settings,self.start,self.stdout = Path(out).expanduser(),settings,time.time(),sys.stdout
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.write('settings.json', settings | dict(
                commit=git_commit(), python=platform.python_version(), cpus=os.cpu_count(), torch_threads=torch.get_num_threads(),
                device=torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine(),
                versions={k:version(k) for k in ('torch','torchvision','timm','fastai','albumentations','pandas','numpy')}))
        except OSError as e: raise UserError(f'the output folder {out} cannot be written ({e.strerror}): give --out another') from None

    def __enter__(self):
        self.redirect = contextlib.redirect_stdout(sys.stderr)
        self.redirect.__enter__()
        return self
    def __exit__(self, kind, *exc):
        self.redirect.__exit__(kind, *exc)
        if kind: print(file=sys.stderr) # end the line a progress bar may have left

    def write(self, name, obj): _write(self.out/name, json.dumps(obj, indent=1, default=str) + '\n')

    def say(self, text): print(text, file=sys.stderr, flush=True)

    def fit(self, learn, name, fit):
        "Run `fit(learn)`, its history in `history_<name>.csv`; progress bars on a terminal, else a line an epoch"
        learn.add_cb(CSVLogger((self.out/f'history_{name}.csv').absolute()))
        if sys.stderr.isatty(): return fit(learn)
        def log(row): self.say('  '.join(f'{k} {v:.4f}' if isinstance(v, float) else f'{k} {v}'
                                         for k,v in zip(learn.recorder.metric_names, row)))
        learn.logger = log
        with learn.no_bar(): fit(learn)

    def log_novel(self, **scoring):
        "Append a scoring of the novel classes to the run's record"
        scoring = dict(time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'), commit=git_commit(), **scoring)
        with open(self.out/'novel_scorings.jsonl', 'a') as f: f.write(json.dumps(scoring) + '\n')

    def finish(self, **result):
        "Write `result.json` and print it as stdout's last line"
        result |= dict(seconds=round(time.time() - self.start, 1), status='finished')
        self.write('result.json', result)
        print(json.dumps(result), file=self.stdout, flush=True)
        return result
