"""A run's folder: settings, versions, histories, checkpoints, weights and the result of one program."""
import contextlib
import json
import math
import os
import platform
import sys
import time

import torch
from fastai.callback.core import Callback

from ..core.device import deterministic
from ..core.distributed import backbone_of, from_rank_zero, log, rank_world, scratch_copy, unwrapped
from ..core.errors import UserError
from ..core.storage import Busy, atomic_write, locked, output_folder, read_json, sweep, user_path, write_json
from ..models.pretrained import load_weights, read_weights, save_weights
from .checkpoint import Checkpoint, Deadline, SkipBatches, StopOnNaN, load_checkpoint, previous_path
from .loggers import logged
from .provenance import command, device_name, git_commit, log_line, now, versions

__all__ = ['Run']


STAGES = ('student_cl', 'teacher', 'student_grdd', 'net') # the networks that a run may train

def default_out(name, demo):
    "Folder of a recipe if no --out is given; a demo has its own folder"
    return f'runs/{name}-demo' if demo else f'runs/{name}'


class History(Callback):
    "Write the Recorder's table as CSV after each epoch"
    order = 66 # before `Checkpoint`
    def __init__(self, path): self.path = path
    def after_epoch(self):
        names = [n for n in self.recorder.metric_names if n != 'time']
        rows = [','.join(map(str, [i, *map(float, row)])) for i,row in enumerate(self.recorder.values)]
        atomic_write(self.path, '\n'.join([','.join(names), *rows]) + '\n')


class Layers(torch.nn.Module):
    "What a model has beside its backbone, under the same names"
    def __init__(self, model):
        super().__init__()
        for k,m in model.named_children():
            if k != 'backbone': self.add_module(k, m)
        for k,p in model.named_parameters(recurse=False): self.register_parameter(k, p)
        for k,b in model.named_buffers(recurse=False): self.register_buffer(k, b)


class Run:
    """The folder of a run, as a context: `with Run(out, settings) as run:`

    Progress goes to stderr, and the result is the last line of stdout. A run can only be resumed with the same settings. Finished work is
    kept as files: a stage is done when its weights and their card exist, and the run is done when `result.json` says so and names those
    weights. Nothing in the folder changes before `begin`. Files that are not the run's own never change. Of several processes the first
    has the folder, and each of the others has a copy. UserError for a folder that cannot be used.
    """
    def __init__(self,
        out, # folder
        settings, # dict of the settings that decide the result
        resume=False, # go on with the run that the folder holds; without `resume` and `overwrite` such a folder is refused
        max_minutes=None, # minutes after which the run stops with everything saved
        plan=(), # names of the stages in their order
        wait=False, # wait if another process works in the folder, instead of a UserError
        overwrite=False, # delete the run that the folder holds
        loggers=None, # names of loggers that follow the training, separated by commas (`logged`)
    ):
        self.given = out
        self.out = user_path(out, '--out')
        self.settings = settings
        self.stdout = sys.stdout
        self.plan = list(plan)
        self.wait = wait
        self.overwrite = overwrite
        self.loggers = loggers
        self.may_resume = resume # whether a run in the folder may go on
        self.resuming = resume # whether there is a run to go on with
        self.start = time.monotonic()
        self.seconds_before = 0. # seconds of the run before it was resumed
        self.deadline = Deadline(max_minutes)
        self.begun = False
        if resume and overwrite: raise UserError('--resume goes on with a run and --overwrite deletes it: give one of them')

    # ---- the folder ---------------------------------------------------------------------------------------------------

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        try:
            self.result = from_rank_zero(self._finished)
            if not self.result: from_rank_zero(self._take)
            if rank_world()[1] > 1: self.out = scratch_copy(self.out)
            self.start = time.monotonic()
            self.stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            self.stack.enter_context(deterministic(self.settings.get('deterministic', False)))
            self.stack.enter_context(self.deadline)
            if not self.result: self.result = self._look() # again, because the process that held the folder may have finished the run
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, kind, error, tb):
        self.stack.close()
        if kind and kind is not SystemExit: print(file=sys.stderr) # end the line a progress bar may have left

    def _finished(self):
        "The result of a finished run, or None; this needs no lock and no folder that can be written"
        return self._look() if self.may_resume and str(self.given).strip() and self.out.is_dir() else None

    def _take(self):
        "Lock the folder for this process, and wait for the lock if `wait` says so"
        self.stack.enter_context(output_folder(self.given))
        busy = f'another run is at work in {self.out}: wait for it or give --out another'
        said = False
        while True:
            try:
                self.stack.enter_context(locked(self.out/'.lock', busy))
                return
            except Busy:
                if not self.wait: raise
                if stop := self.deadline.due(): raise stop from None
            if not said: log(f'another process is at work in {self.out}: waiting for it')
            said = True
            time.sleep(0.5)

    def _files(self):
        "Names of the run's own files that are in the folder"
        names = ['settings.json', 'data.json', 'result.json', 'report.html']
        for s in STAGES:
            names += [f'{s}.safetensors', f'{s}.json', f'{s}_layers.safetensors', f'{s}_layers.json', f'history_{s}.csv',
                      f'checkpoint_{s}.safetensors', f'checkpoint_{s}.previous']
        return [f for f in names if os.path.lexists(self.out/f) and not (self.out/f).is_dir()]

    def _look(self):
        "The result of the finished run in the folder, or None; UserError if the folder holds what must not be lost"
        self.old = read_json(self.out/'settings.json', {})
        if self.old and not (isinstance(self.old.get('settings'), dict) and isinstance(self.old.get('torch_threads'), int)):
            raise UserError(f'{self.out/"settings.json"} is not a run\'s: give --out another folder')
        if not self.old and (files := self._files()):
            raise UserError(f'{self.out} holds {files[0]} but no settings.json of a run that it could be of: '
                            'bring that back from a copy, or give --out another folder')
        if self.overwrite: return None
        result = read_json(self.out/'result.json', {})
        there = [f for f in self._files() if f.endswith('.safetensors') or f.startswith('checkpoint_')]
        if result.get('status') == 'finished': there.append('result.json')
        if not self.may_resume:
            if not there: return None
            kind,remedy = ('a finished', 'print its result') if 'result.json' in there else ('an unfinished', 'go on with it')
            raise UserError(f'{self.out} holds {kind} run: add --resume to {remedy}, --overwrite to delete it, '
                            'or give --out another folder')
        self.resuming = bool(self.old)
        if self.old: self._same_settings()
        seconds = result.get('seconds', 0.)
        if not isinstance(seconds, int | float) or isinstance(seconds, bool):
            raise UserError(f'{self.out/"result.json"} is damaged (seconds is no number): remove it, or give --out another folder')
        self.seconds_before = seconds
        return self._verified(result) if result.get('status') == 'finished' else None

    def _same_settings(self):
        "Raise UserError unless the run in the folder was started with these settings"
        before,asked = flat(self.old['settings']),flat(json.loads(json.dumps(self.settings, default=str)))
        if before.keys() != asked.keys():
            version = (self.old.get('versions') or {}).get('grdd_fastai', '0.1')
            raise UserError(f'{self.out} was started by grdd_fastai {version}, which had other settings: go on with that version, or give '
                            '--out another folder')
        for k in sorted(asked):
            if before[k] == asked[k]: continue
            raise UserError(f'{self.out} was started with {k}={before[k]}, not {asked[k]}: '
                            'resume with the same settings, or give --out another folder')

    def _verified(self, result):
        "Return the finished `result`; UserError unless the weights are whole and are those that it names"
        made_by = self.old.get('versions')
        weights = result.get('weights')
        named = isinstance(made_by, dict) and 'grdd_fastai' in made_by # older results do not name their weights
        for name in self.plan:
            if name not in STAGES: continue
            card,_ = read_weights(self.out/name)
            if not named or (isinstance(weights, dict) and weights.get(name) == card['sha256']): continue
            raise UserError(f'{self.out/"result.json"} is of other weights than {name}.safetensors: '
                            'take both from a copy, or give --out another folder')
        return result

    def begin(self, data, cache=None):
        """Begin the run on a `FewShotData`, or go on with it

        `cache` is the folder for features that the run keeps. UserError if the data has changed since the run was started.
        """
        self.cache = cache
        self.card = dict(classes=data.train.vocab, px=data.px, crop=data.train.crop, stats=data.stats, fingerprint=data.fingerprint,
                         settings={k:v for k,v in self.settings.items() if k != 'data'})
        sweep(self.out)
        if self.resuming:
            began = read_json(self.out/'data.json', {}).get('fingerprint', data.fingerprint)
            if began != data.fingerprint:
                raise UserError(f'the data changed since {self.out} was started: bring back the data it began with, '
                                'or give --out another folder')
            threads = torch.get_num_threads()
            if self.old['torch_threads'] != threads:
                log(f'started with {self.old["torch_threads"]} threads, now {threads}: the weights will differ in their last bits')
        else:
            if files := self._files():
                names = ', '.join(files)
                if self.overwrite: log(f'--overwrite: deleting {names} in {self.out}')
                for f in files: (self.out/f).unlink(missing_ok=True)
            write_json(self.out/'settings.json', dict(
                settings=self.settings, command=command(), commit=git_commit(), python=platform.python_version(), cpus=os.cpu_count(),
                torch_threads=torch.get_num_threads(), device=device_name(), versions=versions()))
        self.begun = True
        write_json(self.out/'data.json', dict(name=data.name, px=data.px, resize=data.resize, fingerprint=data.fingerprint,
                                               image_fingerprint=data.image_fingerprint, stats=data.stats))
        log(f'{data}')

    def seconds(self):
        "Seconds that the run has taken, with those before it was resumed"
        return round(self.seconds_before + time.monotonic() - self.start, 1)

    # ---- stages -------------------------------------------------------------------------------------------------------

    def train(self, name, learn, fit, arch):
        """Fit a Learner, go on with its fit, or load what it gave

        Returns the network and its best validation accuracy (%). `arch` is the timm name of the network, which its card records. The layers
        that a model has beside its backbone are kept in files of their own if its attribute `keeps_layers` says so.
        """
        net = backbone_of(learn)
        path,checkpoint = self.out/name,self.out/f'checkpoint_{name}.safetensors'
        model = unwrapped(learn.model)
        layers = Layers(model) if getattr(model, 'keeps_layers', False) else None
        if self.resuming and (self.out/f'{name}.json').exists():
            best = load_weights(net, path)['val_accuracy']
            if layers: load_weights(layers, f'{path}_layers')
        else:
            log(f'training {name}, {arch}')
            self._fit(name, learn, fit, checkpoint)
            best = learn.keep_best.best
            if layers: save_weights(layers, f'{path}_layers', val_accuracy=best)
            save_weights(net, path, arch=arch, **self.card, val_accuracy=best)
        for f in (checkpoint, previous_path(checkpoint)): f.unlink(missing_ok=True)
        self.plan.remove(name)
        return net,best

    def stop_if_due(self, worked):
        """Raise `Stopped` if the time is used up or a signal has come in a process that `worked` since the last call

        A long computation before the steps of a fit calls this in all processes now and then, so that all of them stop.
        """
        if stop := self.deadline.check(mine=worked): raise stop

    def _fit(self, name, learn, fit, checkpoint):
        state = load_checkpoint(checkpoint, log) if self.resuming else None
        if state:
            seconds = state[1].get('seconds')
            if isinstance(seconds, float): self.seconds_before = max(self.seconds_before, seconds)
            log(f'{name} goes on at epoch {state[1].get("epoch")}, step {state[1].get("step")}')
        def about(): return dict(stage=name, seconds=self.seconds())
        learn.add_cbs([SkipBatches(), History(self.out/f'history_{name}.csv'), StopOnNaN(name),
                       Checkpoint(checkpoint, about, self.deadline, resume=state)])
        def log_epoch(row):
            named = zip(learn.recorder.metric_names, row)
            log('  '.join(f'{k} {v:.4f}' if isinstance(v, float) else f'{k} {v}' for k,v in named))
        self.deadline.fitting = True
        try:
            with learn.distrib_ctx(), logged(learn, self.loggers, self.out, name, self.settings):
                if sys.stderr.isatty() and rank_world()[0] == 0: return fit(learn)
                learn.logger = log_epoch # a log file gets one line per epoch instead of progress bars
                with learn.no_bar(): fit(learn)
        finally: self.deadline.fitting = False

    # ---- results ------------------------------------------------------------------------------------------------------

    def finish(self, **result):
        "Write `result.json`, with the checksums of the weights, and print it as the last line of stdout; return the result"
        cards = {s:self.out/f'{s}.json' for s in STAGES}
        weights = {s:read_json(card, keys=dict(sha256=str))['sha256'] for s,card in cards.items() if card.exists()}
        return self._report(result | dict(weights=weights, seconds=self.seconds(), status='finished'))

    def stopped(self, stop):
        "Log what is left to do after `stop` (`Stopped`), write it to `result.json` and return it; after a signal, exit with its code"
        left = ', '.join([self.plan[0] + stop.where, *self.plan[1:]])
        log(f'stopped ({stop}): left to do are {left}; --resume goes on')
        result = dict(settings=self.settings, seconds=self.seconds(), status='stopped', left=left)
        if self.begun: self._report(result)
        else: self.print(result)
        if stop.code: sys.exit(stop.code)
        return result

    def _report(self, result):
        result = _plain(result)
        write_json(self.out/'result.json', result)
        return self.print(result)
    def print(self, result):
        "Print the result on stdout in the first process, and return it"
        if rank_world()[0] == 0: print(json.dumps(result, default=str), file=self.stdout, flush=True)
        return result

    def log_novel(self, **scoring):
        "Append a scoring of the novel classes to the run's log"
        log_line(self.out/'novel_scorings.jsonl', dict(time=now(), commit=git_commit(), **scoring))

def flat(settings, prefix=''):
    "Nested settings as one dict with names such as student.lr"
    found = {}
    for k,v in settings.items(): found |= flat(v, f'{prefix}{k}.') if isinstance(v, dict) else {prefix + k:v}
    return found

def _plain(result):
    "The result with None for each number that is not finite, because JSON has no NaN"
    return {k:None if isinstance(v, float) and not math.isfinite(v) else v for k,v in result.items()}
