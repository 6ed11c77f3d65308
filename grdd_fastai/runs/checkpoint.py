"""Checkpoints of a fit: what a `FewShotLearner` needs to go on bit for bit as if it had never stopped."""
import math
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from fastai.callback.core import Callback, CancelBatchException
from fastcore.foundation import L

from ..core.device import LateNumber
from ..core.distributed import LateMax, from_rank_zero, rank_world, unwrapped
from ..core.errors import UserError, first_line
from ..core.storage import check_state, load_state, load_tensors, save_tensors
from ..training.callbacks import LossTerm, UndoAfterFit

__all__ = ['Stopped', 'Deadline', 'learner_state', 'load_learner_state', 'load_checkpoint', 'previous_path', 'Checkpoint', 'SkipBatches',
           'StopOnNaN']


MINUTES = 2 # minutes between checkpoints
FORMAT = 1 # format of the tensors and meta of a checkpoint; a checkpoint that names no format has format 1


class Stopped(BaseException):
    """Raised when a run stops with its state saved; `code` is the exit code, `where` the place in the stage

    Like KeyboardInterrupt it is no subclass of Exception, so that code which looks for damaged files does not catch it.
    """
    def __init__(self, why, code):
        super().__init__(why)
        self.why = why
        self.code = code
        self.where = ''
    def __reduce__(self): return type(self),(self.why, self.code)
    def __str__(self): return self.why # fastai puts a callback's name into `args`


class Deadline:
    "Says when to stop: after `max_minutes`, or when SIGINT or SIGTERM arrives while it is used as a context"
    def __init__(self, max_minutes=None):
        self.end = None if max_minutes is None else time.monotonic() + 60*max_minutes
        self.signal = None # number of the signal that arrived
        self.fitting = False # True during a fit, which saves before it stops
        self.agreed = LateMax()
    def __enter__(self):
        main = threading.current_thread() is threading.main_thread() # only the main thread may set signal handlers
        self.old = {s:signal.signal(s, self.caught) for s in (signal.SIGINT, signal.SIGTERM)} if main else {}
        return self
    def __exit__(self, *_):
        for s,handler in self.old.items(): signal.signal(s, handler)
    def signalled(self, number): return Stopped(signal.Signals(number).name, 128 + number)
    def caught(self, number, frame):
        "Handle a signal: during a fit the next step saves and stops; at any other time everything is saved already"
        if self.signal or not self.fitting: raise self.signalled(number)
        self.signal = number
    def due(self):
        "The reason for this process to stop as a `Stopped`, or None"
        return self.why(self.code())
    def code(self):
        "The reason to stop as a number: that of the signal, 1 if the time is used up, 0 for no reason"
        return self.signal or int(self.end is not None and time.monotonic() >= self.end)
    def why(self, code):
        "`Stopped` for a `code`, None for 0"
        if code > 1: return self.signalled(code)
        return Stopped('the time is used up', 0) if code else None
    def check(self, late=False, mine=True):
        """The reason to stop now as a `Stopped`, or None; if one of several processes has to stop, all processes stop

        With `late`, several processes stop one such call later, and none of them waits for the others. Without `mine`, this process has no
        reason of its own.
        """
        code = self.code() if mine else 0
        if rank_world()[1] > 1:
            before = self.agreed.result()
            self.agreed.start(code)
            code = before if late else self.agreed.result()
        return self.why(code)


# ---- a Learner's state as tensors and JSON ----------------------------------------------------------------------------

def learner_state(learn):
    "(tensors, meta) of a `FewShotLearner`: weights, their moving average, optimiser, best weights so far, history and running means"
    tensors = {f'model/{k}':v for k,v in unwrapped(learn.model).state_dict().items()}
    if hasattr(learn, 'ema'): tensors.update({f'ema/{k}':v for k,v in learn.ema.average.state_dict().items()})
    opt = learn.opt.state_dict()
    scalars = {}
    for i,state in opt['state'].items():
        for k,v in state.items():
            if isinstance(v, torch.Tensor): tensors[f'opt/{i}/{k}'] = v
            elif v is not None: scalars[f'{i}/{k}'] = v
    meta = dict(opt=scalars, scaler=learn.scaler.state_dict() if getattr(learn, 'scaler', None) else {},
                groups=[{k:v for k,v in g.items() if k != 'params'} for g in opt['param_groups']],
                values=[[float(v) for v in row] for row in learn.recorder.values],
                smooth_loss=[float(learn.recorder.smooth_loss.val), learn.recorder.smooth_loss.count],
                parts={cb.name:{k:[float(t), n] for k,(t,n) in cb.totals.items()} for cb in learn.cbs if isinstance(cb, LossTerm)})
    best = getattr(learn, 'keep_best', None)
    if best is not None and best.best_state:
        tensors.update({f'best/{k}':v for k,v in best.best_state.items()})
        meta['best'] = [float(best.best), best.best_epoch]
    return tensors,meta

def with_prefix(tensors, prefix):
    "The tensors whose names begin with `prefix`, by the rest of their names"
    return {k.removeprefix(prefix):v for k,v in tensors.items() if k.startswith(prefix)}

def with_valid_loss(row, names):
    "A row of a history, with NaN for `valid_loss` if it is from an older checkpoint, which does not have it"
    if len(row) != len(names) - 1 or 'valid_loss' not in names: return row
    i = names.index('valid_loss')
    return [*row[:i], math.nan, *row[i:]]

def load_learner_state(learn, tensors, meta, where='the checkpoint'):
    """Restore the state of `learner_state` inside a fit that has begun; `where` names the file in errors

    UserError for tensors that do not fit the network.
    """
    device = learn.dls.device
    load_state(unwrapped(learn.model), with_prefix(tensors, 'model/'), where)
    if hasattr(learn, 'ema'): load_state(learn.ema.average, with_prefix(tensors, 'ema/'), where)
    opt = learn.opt.opt if hasattr(learn.opt, 'opt') else learn.opt
    params = [p for g in opt.param_groups for p in g['params']]
    state = {}
    for k,v in with_prefix(tensors, 'opt/').items():
        i,name = k.split('/')
        p = params[int(i)]
        if v.ndim and v.shape != p.shape: # a fused optimiser would read past the end of the tensor
            raise UserError(f'{where} holds {k} of shape {tuple(v.shape)}, not {tuple(p.shape)}: give --out another folder')
        if v.ndim and v.shape == p.shape: v = torch.empty_like(p).copy_(v) # in the memory layout of the parameter
        state.setdefault(int(i), {})[name] = v
    for k,v in meta['opt'].items():
        i,name = k.split('/')
        state.setdefault(int(i), {})[name] = v
    groups = [{**g, 'params':now['params']} for g,now in zip(meta['groups'], opt.state_dict()['param_groups'])]
    opt.load_state_dict(dict(state=state, param_groups=groups))
    if meta.get('scaler'): learn.scaler.load_state_dict(meta['scaler'])
    names = list(learn.recorder.metric_names[1:-1]) # without epoch and time
    learn.recorder.values = [L(with_valid_loss(row, names)) for row in meta['values']]
    mean,count = meta['smooth_loss']
    learn.recorder.smooth_loss.val = torch.tensor(mean)
    learn.recorder.smooth_loss.count = count
    if 'best' in meta:
        check_state(unwrapped(learn.model), with_prefix(tensors, 'best/'), where)
        learn.keep_best.best,learn.keep_best.best_epoch = meta['best']
        learn.keep_best.best_state = {k:v.to(device) for k,v in with_prefix(tensors, 'best/').items()}


def load_checkpoint(path, log=print):
    """(tensors, meta) of the checkpoint at `path`, or of the one before it if that is damaged; None if there is none

    UserError if there are checkpoints and all are damaged.
    """
    paths = [p for p in (Path(path), previous_path(path)) if p.exists()]
    for p in paths:
        try: return load_tensors(p)
        except UserError as e:
            rest = '; the checkpoint before it is used' if p != paths[-1] else ''
            log(f'{e}{rest}')
    if paths: raise UserError(f'no checkpoint in {Path(path).parent} is whole: start again in another --out')

def previous_path(path):
    "File of the checkpoint that was saved before the one at `path`"
    return Path(path).with_suffix('.previous')


class Checkpoint(UndoAfterFit):
    """Save the fit to `path` every `minutes` and when `deadline` says stop; go on from `resume`

    The state is copied between two steps. A thread writes it while training goes on, never two at once. Of several processes only the
    first one saves. UserError if a checkpoint cannot be written or holds NaN; the one before it is kept.
    """
    order = 70 # after all other callbacks, when the state is complete
    def __init__(self,
        path, # file of the checkpoint; the checkpoint before it is kept beside it
        about, # function that returns a dict (stage, seconds, ...) for the checkpoint
        deadline, # `Deadline`
        minutes=None, # minutes between checkpoints (`MINUTES`)
        resume=None, # (tensors, meta) of `load_checkpoint`
    ):
        self.path = Path(path)
        self.about = about
        self.deadline = deadline
        self.state = resume
        self.minutes = MINUTES if minutes is None else minutes

    def before_fit(self):
        self.saved = time.monotonic()
        self.pool = ThreadPoolExecutor(1)
        self.writing = None # the last checkpoint that the thread was given to write
        self.skip = 0
        if not self.state: return
        tensors,meta = self.state
        self.check(meta)
        try: load_learner_state(self.learn, tensors, meta, self.path)
        except UserError: raise
        except Exception as e:
            raise UserError(f'{self.path} is not a checkpoint of this training ({type(e).__name__}: {first_line(e)}): '
                            'give --out another folder') from None
        self.learn.first_epoch = meta['epoch']
        self.skip = meta['step']
        self.totals = meta['parts']
        self.state = None

    def check(self, meta):
        "Raise UserError unless `meta` has this version's format and belongs to this training"
        found = meta.get('format', 1)
        if found != FORMAT:
            raise UserError(f'{self.path} has format {found} and this version of grdd_fastai reads {FORMAT}: '
                            'go on with the version that wrote it, or give --out another folder')
        if 'relatedness_distiller' in (meta.get('parts') or ()): # the term of stage two before version 0.2
            raise UserError(f'{self.path} is of grdd_fastai 0.1: go on with that version, or give --out another folder')
        if not (self.has_place(meta) and self.is_complete(meta)):
            epoch,step = meta.get('epoch'),meta.get('step')
            raise UserError(f'{self.path} is not a checkpoint of this training (epoch {epoch}, step {step}, of {self.n_epoch} epochs): '
                            'give --out another folder')

    def has_place(self, meta):
        "Whether `meta` is of this stage and of an epoch and a step that the fit comes to"
        epoch,step = meta.get('epoch'),meta.get('step')
        return (meta.get('stage') == self.about().get('stage') and type(epoch) is int and type(step) is int and 0 <= epoch <= self.n_epoch
                and 0 <= step < len(self.dls.train) and (epoch < self.n_epoch or step == 0))

    def is_complete(self, meta):
        "Whether the entries of `meta` are of the right kinds and fit the Learner's terms of the loss"
        kinds = dict(parts=dict, opt=dict, groups=list, smooth_loss=list, scaler=dict, values=list)
        if not all(isinstance(meta.get(k), kind) for k,kind in kinds.items()): return False
        def numbers(v, n=None): return isinstance(v, list) and n in (None, len(v)) and all(isinstance(o, int | float) for o in v)
        def pairs(v): return isinstance(v, dict) and all(numbers(o, 2) for o in v.values())
        def group(v): return isinstance(v, dict) and all(o is None or isinstance(o, int | float | list) for o in v.values())
        terms = {cb.name:set(cb.parts) for cb in self.learn.cbs if isinstance(cb, LossTerm)}
        return (numbers(meta['smooth_loss'], 2) and all(map(pairs, meta['parts'].values())) and all(map(group, meta['groups']))
                and {k:set(v) for k,v in meta['parts'].items()} == terms and ('best' not in meta or numbers(meta['best'], 2))
                and all(map(numbers, meta['values'])) and len(meta['values']) == meta['epoch'])

    def before_train(self):
        "In the epoch of the checkpoint, restore the means of the epoch so far; `SkipBatches` skips its first `skip` batches"
        self.learn.skip_batches.n = self.skip
        self.skip = 0
        if not self.learn.skip_batches.n: return
        for cb in self.learn.cbs:
            # numbers, which go to any device
            if isinstance(cb, LossTerm): cb.totals = {k:[t, n] for k,(t,n) in self.totals[cb.name].items()}

    def after_batch(self):
        if not self.training or self.iter < self.learn.skip_batches.n or self.iter + 1 == self.n_iter: return
        if stop := self.deadline.check(late=True): self.stop(stop, self.epoch, self.iter + 1)
        self.save_in_time(self.epoch, self.iter + 1)

    def after_epoch(self):
        if self.epoch + 1 < self.n_epoch and (stop := self.deadline.check()): self.stop(stop, self.epoch + 1, 0)
        self.save_in_time(self.epoch + 1, 0)

    def after_fit(self): self.pool.shutdown() # waits for the thread

    def stop(self, stop, epoch, step):
        "Save the state and raise `stop`; of several processes, none goes on before the first one has saved"
        def save():
            self.finish_writing()
            self.write(*self.snapshot(epoch, step))
        from_rank_zero(save)
        stop.where = f' from epoch {epoch}, step {step} on, of {self.n_epoch} epochs'
        raise stop

    def save_in_time(self, epoch, step):
        "Give the thread the state to write if it is time and the thread is free"
        if rank_world()[0] > 0 or (self.writing and not self.writing.done()): return
        self.finish_writing()
        if time.monotonic() - self.saved < 60*self.minutes: return
        self.saved = time.monotonic()
        self.writing = self.pool.submit(self.write, *self.snapshot(epoch, step))

    def finish_writing(self):
        "Wait for the thread, and raise the error that it met"
        writing,self.writing = self.writing,None
        if writing: writing.result()

    def snapshot(self, epoch, step):
        "A copy of the fit's state: tensors on the CPU, and meta"
        tensors,meta = learner_state(self.learn)
        tensors = {k:v.detach().to('cpu', copy=True) for k,v in tensors.items()}
        return tensors,self.about() | meta | dict(format=FORMAT, epoch=epoch, step=step)

    def write(self, tensors, meta):
        bad = next((k for k,v in tensors.items() if not torch.isfinite(v).all()), None)
        if bad:
            raise UserError(f'{meta["stage"]}, epoch {meta["epoch"]}, step {meta["step"]}: {bad} holds NaN or infinite values: lower the '
                            'learning rate; the last good checkpoint is kept')
        if self.path.exists(): self.path.replace(previous_path(self.path))
        save_tensors(self.path, tensors, meta)


class SkipBatches(Callback):
    "Skip the first `n` batches of an epoch: they count in no loss or metric, and the schedule moves on"
    order = -20
    run_valid = False
    n = 0
    def before_batch(self):
        if self.iter >= self.n: return
        self.learn.yb = () # without labels, the Recorder counts no images
        raise CancelBatchException()


class StopOnNaN(Callback):
    """Raise UserError, with the stage, the epoch and the step, if the loss is NaN or infinite

    On a GPU the loss of a step is looked at after the next step (`LightRecorder`), because looking at once would make the GPU wait.
    """
    order = 65 # before `Checkpoint`
    run_valid = False
    def __init__(self, stage): self.stage = stage
    def after_loss(self):
        if not LateNumber.is_late(self.learn.loss): self.check(self.epoch, self.iter, float(self.learn.loss.detach()))
    def after_batch(self):
        if self.learn.light_recorder.arrived: self.check(*self.learn.light_recorder.arrived)
    def after_train(self): self.after_batch()
    def check(self, epoch, step, loss):
        if math.isfinite(loss): return
        raise UserError(f'{self.stage}, epoch {epoch}, step {step}: the loss is {loss}: '
                        'lower the learning rate; the last good checkpoint is kept')
