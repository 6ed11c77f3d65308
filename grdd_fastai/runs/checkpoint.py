"""Checkpoint and resume a fit, to the bit: what a Learner of ours needs to go on as if it had never stopped."""
import signal
import threading
import time
from pathlib import Path

import torch
from fastai.callback.core import Callback, CancelBatchException
from fastcore.foundation import L

from ..core.distributed import all_max, unwrapped
from ..core.errors import UserError, first_line
from ..core.storage import check_state, load_state, load_tensors, save_tensors
from ..training.callbacks import LossTerm

__all__ = ['Stopped', 'Deadline', 'learner_state', 'load_learner_state', 'load_checkpoint', 'previous', 'Checkpoint', 'SkipBatches',
           'StopOnNaN']


MINUTES = 5 # between checkpoints inside an epoch
FORMAT = 1 # of a checkpoint's tensors and meta; those of before it was written down are of the same


class Stopped(BaseException):
    """The run was stopped, its state is saved; `code` is the exit code, `where` the place in the stage

    As KeyboardInterrupt it is no Exception, so that nobody who looks for a damaged file takes a signal for one.
    """
    def __init__(self, why, code): super().__init__(why); self.why,self.code,self.where = why,code,''
    def __reduce__(self): return type(self),(self.why, self.code)
    def __str__(self): return self.why # fastai puts a callback's name into `args`


class Deadline:
    "Says when to stop: after `max_minutes`, or once SIGINT or SIGTERM came (while used as a context)"
    def __init__(self, max_minutes=None):
        self.end,self.signal,self.fitting = None if max_minutes is None else time.monotonic() + 60*max_minutes,None,False
    def __enter__(self):
        if threading.current_thread() is not threading.main_thread(): self.old = {}
        else: self.old = {s:signal.signal(s, self.caught) for s in (signal.SIGINT, signal.SIGTERM)}
        return self
    def __exit__(self, *_):
        for s,handler in self.old.items(): signal.signal(s, handler)
    def signalled(self, number): return Stopped(signal.Signals(number).name, 128 + number)
    def caught(self, number, frame):
        "While fitting, the next step boundary saves; elsewhere everything is saved already"
        if self.signal or not self.fitting: raise self.signalled(number)
        self.signal = number
    def due(self):
        "The reason for this process to stop"
        return self.why(self.code())
    def code(self): return self.signal or -1*(self.end is not None and time.monotonic() >= self.end)
    def why(self, code): return self.signalled(code) if code > 0 else Stopped('the time is used up', 0) if code < 0 else None
    def check(self):
        "The reason to stop now as a `Stopped`, or None; of several processes all stop where one has to"
        return self.why(all_max(self.code(), key=abs))


# ---- a Learner's state as tensors and JSON ----------------------------------------------------------------------------

def learner_state(learn):
    "(tensors, meta): weights, optimiser, best weights so far, history and running means of a Learner of ours"
    tensors = {f'model/{k}':v for k,v in unwrapped(learn.model).state_dict().items()}
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

def part(tensors, prefix): return {k.removeprefix(prefix):v for k,v in tensors.items() if k.startswith(prefix)}

def load_learner_state(learn, tensors, meta, where='the checkpoint'):
    "Undo `learner_state`, inside a fit that has begun; `where` names the file in errors"
    device = learn.dls.device
    load_state(unwrapped(learn.model), part(tensors, 'model/'), where)
    opt = learn.opt.opt if hasattr(learn.opt, 'opt') else learn.opt
    ps,state = [p for g in opt.param_groups for p in g['params']],{}
    for k,v in part(tensors, 'opt/').items():
        i,name = k.split('/')
        if v.ndim and v.shape != ps[int(i)].shape: # a fused optimiser would read past its end
            raise UserError(f'{where} holds {k} of shape {tuple(v.shape)}, not {tuple(ps[int(i)].shape)}: give --out another folder')
        if v.shape == ps[int(i)].shape: v = torch.empty_like(ps[int(i)]).copy_(v) # in the parameter's memory layout
        state.setdefault(int(i), {})[name] = v
    for k,v in meta['opt'].items():
        i,name = k.split('/')
        state.setdefault(int(i), {})[name] = v
    groups = [{**g, 'params':now['params']} for g,now in zip(meta['groups'], opt.state_dict()['param_groups'])]
    opt.load_state_dict(dict(state=state, param_groups=groups))
    if meta.get('scaler'): learn.scaler.load_state_dict(meta['scaler'])
    learn.recorder.values = [L(row) for row in meta['values']]
    learn.recorder.smooth_loss.val,learn.recorder.smooth_loss.count = torch.tensor(meta['smooth_loss'][0]),meta['smooth_loss'][1]
    if 'best' in meta:
        check_state(unwrapped(learn.model), part(tensors, 'best/'), where)
        learn.keep_best.best,learn.keep_best.best_epoch = meta['best']
        learn.keep_best.best_state = {k:v.to(device) for k,v in part(tensors, 'best/').items()}


def load_checkpoint(path, log=print):
    "(tensors, meta) of the checkpoint at `path`, of the one before it where that is damaged, None where there is none"
    paths = [p for p in (Path(path), previous(path)) if p.exists()]
    for p in paths:
        try: return load_tensors(p)
        except UserError as e: log(f'{e}' + ('; the checkpoint before it is used' if p != paths[-1] else ''))
    if paths: raise UserError(f'no checkpoint in {Path(path).parent} is whole: start again in another --out')

def previous(path):
    "Where the checkpoint before the one at `path` is kept"
    return Path(path).with_suffix('.previous')


class Checkpoint(Callback):
    "Save the fit's state to `path` at each epoch's end, every `minutes`, and when `deadline` says stop; go on from `resume`"
    order = 70 # after every other: the state is whole
    def __init__(self,
        path, # of the checkpoint; the one before it lies beside it until the new one is whole
        about, # function whose dict (stage, seconds, ...) goes into the checkpoint
        deadline, # `Deadline`
        minutes=None, # between checkpoints inside an epoch (`MINUTES`)
        resume=None, # (tensors, meta) of `load_checkpoint`
    ):
        self.path,self.about,self.deadline,self.state = Path(path),about,deadline,resume
        self.minutes = MINUTES if minutes is None else minutes

    def before_fit(self):
        self.saved,self.skip = time.monotonic(),0
        if not self.state: return
        tensors,meta = self.state
        self.check(meta)
        try: load_learner_state(self.learn, tensors, meta, self.path)
        except UserError: raise
        except Exception as e:
            raise UserError(f'{self.path} is not a checkpoint of this training ({type(e).__name__}: {first_line(e)}): '
                            'give --out another folder') from None
        self.learn.first_epoch,self.skip,self.totals = meta['epoch'],meta['step'],meta['parts']
        self.state = None

    def check(self, meta):
        "UserError unless `meta` is of this format and of a place that the fit comes to"
        if (found := meta.get('format', 1)) != FORMAT: raise UserError(
            f'{self.path} has format {found} and this version of grdd_fastai reads {FORMAT}: '
            'go on with the version that wrote it, or give --out another folder')
        epoch,step,terms = meta.get('epoch'),meta.get('step'),[cb.name for cb in self.learn.cbs if isinstance(cb, LossTerm)]
        ok = (meta.get('stage') == self.about().get('stage') and type(epoch) is int and type(step) is int and 0 <= epoch <= self.n_epoch
              and 0 <= step < len(self.dls.train) and (epoch < self.n_epoch or step == 0))
        ok = ok and all(isinstance(meta.get(k), kind)
                        for k,kind in dict(parts=dict, opt=dict, groups=list, smooth_loss=list, scaler=dict).items())
        def numbers(v, n=None): return isinstance(v, list) and n in (None, len(v)) and all(isinstance(o, int | float) for o in v)
        ok = (ok and numbers(meta['smooth_loss'], 2)
              and all(isinstance(p, dict) and all(numbers(v, 2) for v in p.values()) for p in meta['parts'].values()))
        ok = ok and all(set(cb.parts) == set(meta['parts'].get(cb.name, ())) for cb in self.learn.cbs if isinstance(cb, LossTerm))
        ok = ok and ('best' not in meta or numbers(meta['best'], 2)) and all(numbers(v) for v in meta.get('values') or [])
        ok = ok and all(isinstance(g, dict) and all(v is None or isinstance(v, int | float | list) for v in g.values())
                        for g in meta['groups'])
        ok = (ok and isinstance(meta.get('values'), list) and len(meta['values']) == epoch and isinstance(meta.get('parts'), dict)
              and sorted(meta['parts']) == sorted(terms))
        if not ok:
            raise UserError(f'{self.path} is not a checkpoint of this training (epoch {epoch}, step {step}, of {self.n_epoch} epochs): '
                            'give --out another folder')

    def before_train(self):
        "The epoch's first `skip` batches were trained on before: `SkipBatches` passes them by"
        self.learn.skip_batches.n,self.skip = self.skip,0
        if self.learn.skip_batches.n:
            for cb in self.learn.cbs:
                if isinstance(cb, LossTerm): cb.totals = {k:[torch.tensor(t), n] for k,(t,n) in self.totals[cb.name].items()}

    def after_batch(self):
        if not self.training or self.iter < self.learn.skip_batches.n or self.iter + 1 == self.n_iter: return
        stop = self.deadline.check()
        if stop or time.monotonic() - self.saved >= 60*self.minutes: self.save(self.epoch, self.iter + 1)
        if stop: self.stop(stop, self.epoch, self.iter + 1)

    def after_epoch(self):
        self.save(self.epoch + 1, 0)
        if self.epoch + 1 < self.n_epoch and (stop := self.deadline.check()): self.stop(stop, self.epoch + 1, 0)

    def stop(self, stop, epoch, step):
        stop.where = f' from epoch {epoch}, step {step} on, of {self.n_epoch} epochs'
        raise stop

    def save(self, epoch, step):
        (tensors,meta),about = learner_state(self.learn),self.about()
        bad = next((k for k,v in tensors.items() if not torch.isfinite(v).all()), None)
        if bad: raise UserError(f'{about["stage"]}, epoch {epoch}, step {step}: {bad} holds NaN or infinite values: lower the '
                                'learning rate; the last good checkpoint is kept')
        if self.path.exists(): self.path.replace(previous(self.path))
        save_tensors(self.path, tensors, about | meta | dict(format=FORMAT, epoch=epoch, step=step))
        self.saved = time.monotonic()


class SkipBatches(Callback):
    "Pass by the first `n` batches of an epoch, uncounted in loss and metrics, with the schedule moving on"
    order,run_valid,n = -20,False,0
    def before_batch(self):
        if self.iter >= self.n: return
        self.learn.yb = () # nothing for the Recorder
        raise CancelBatchException()


class StopOnNaN(Callback):
    "A loss that is NaN or infinite ends the fit with the epoch and the step"
    order,run_valid = 65,False
    def __init__(self, stage): self.stage = stage
    def after_loss(self):
        if not torch.isfinite(self.learn.loss): raise UserError(
            f'{self.stage}, epoch {self.epoch}, step {self.iter}: the loss is {float(self.learn.loss)}: lower the learning rate; '
            'the last good checkpoint is kept')
