"""Callbacks of both stages: mixed precision, seeds, terms of the loss and the metrics that a fit shows."""
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.learner import AvgSmoothLoss, Recorder, ValueMetric

from ..core.device import LateNumber, amp, autocast_dtype, seed_generators
from ..core.distributed import rank_world

__all__ = ['UndoAfterFit', 'Frozen', 'Autocast', 'amp_dtype', 'Seeded', 'SmoothLoss', 'LightRecorder', 'ShowsMetrics', 'LossTerm']


class UndoAfterFit(Callback):
    """A callback that changes something for the time of a fit and undoes the change in `after_fit`

    A `FewShotLearner` calls `after_fit` whatever ends the fit, also an error or Ctrl-C. fastai calls it for its own Cancel exceptions only.
    """


class Frozen(UndoAfterFit):
    "`networks` in eval mode, without gradients, on the device of the batches; after the fit their mode and flags are as before"
    run_valid = False
    networks = ()
    def before_fit(self):
        self.were = [(net, net.training, [(p, p.requires_grad) for p in net.parameters()]) for net in self.networks]
        for net in self.networks: net.eval().requires_grad_(False).to(self.dls.device)
    def after_fit(self):
        for net,training,grads in self.were:
            net.train(training)
            for p,grad in grads: p.requires_grad_(grad)
        self.were = []


class Autocast(MixedPrecision, UndoAfterFit):
    """fastai's MixedPrecision with the dtype of `autocast_dtype`, around the model's forward pass only

    The loss is computed in float32. Gradients in float16 are scaled, and a step whose gradients overflow is skipped.
    """
    @property
    def dtype(self): return autocast_dtype(torch.device(self.dls.device))
    def before_fit(self):
        self.handles = []
        self.learn.scaler = torch.amp.GradScaler(torch.device(self.dls.device).type, enabled=self.dtype is torch.float16)
        self.scales = []
        if self.dtype is None: return
        cast = amp(self.dls.device, self.dtype)
        def enter(*_): cast.__enter__()
        def leave(*_): cast.__exit__(None, None, None)
        self.handles = [self.model.register_forward_pre_hook(enter), self.model.register_forward_hook(leave, always_call=True)]
    def before_batch(self): pass
    def after_loss(self): pass
    def after_fit(self):
        for h in self.handles: h.remove()
        self.learn.scaler = None


def amp_dtype(learn):
    "The dtype to which the Learner's forward passes are autocast; None for float32"
    return getattr(getattr(learn, 'autocast', None), 'dtype', None)


class Seeded(UndoAfterFit):
    "Make dropout, order and augmentation depend on `seed`, epoch and step only; the caller's random state is restored after the fit"
    order = -10
    def __init__(self, seed=0):
        self.seed = seed
        self.epochs_done = 0 # epochs of earlier fits
    def before_fit(self):
        self.run = not (hasattr(self.learn, 'lr_finder') or hasattr(self.learn, 'gather_preds')) # neither counts as epochs
        self.finished = 0 # epochs that this fit has finished
        self.cpu_state = torch.get_rng_state()
        self.cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    def before_train(self):
        if hasattr(self.dl, 'epoch'): self.dl.epoch = self.epochs_done + self.epoch - 1 # the loader adds 1 when its epoch begins
    def before_batch(self):
        step = (self.seed*1_000_003 + self.epochs_done + self.epoch)*1_000_003 + self.iter
        if self.training: seed_generators(self.dls.device, (step + rank_world()[0]*1_000_000_007) % 2**63) # each process has its own
    def after_epoch(self): self.finished = self.epoch + 1
    def after_fit(self):
        self.epochs_done += self.finished
        self.run = True
        torch.set_rng_state(self.cpu_state)
        if self.cuda_states: torch.cuda.set_rng_state_all(self.cuda_states)


class SmoothLoss(AvgSmoothLoss):
    "fastai's smoothed loss, kept on the loss's device and, of several processes, of this one alone"
    def accumulate(self, learn):
        self.count += 1
        loss = learn.loss.detach().mean()
        self.val = torch.lerp(loss, self.val.to(loss.device), self.beta)


class LightRecorder(Callback):
    """Turn the losses that the Recorder keeps of each step into numbers, without waiting for a GPU

    The memory around a small tensor cannot be used again as long as the tensor is kept. A GPU's number arrives a step later, also in the
    progress bar. `arrived` is the last number with its epoch and step.
    """
    order = Recorder.order + 1
    run_valid = False
    def before_fit(self): self.late,self.sent,self.arrived = LateNumber(),None,None
    def after_batch(self):
        if len(self.yb) == 0: return # a skipped batch, which the Recorder does not count either
        self.receive()
        losses = self.recorder.losses
        self.late.send(losses[-1])
        self.sent = self.epoch,self.iter,len(losses) - 1
        if self.late.is_late(losses[-1]): self.learn.smooth_loss = torch.tensor(self.arrived[-1] if self.arrived else float('nan'))
        else: self.receive()
    def after_cancel_train(self): self.recorder.cancel_train = False # an epoch that was cut short (`ShortEpochCallback`) has a loss, too
    def after_train(self): self.receive()
    def receive(self):
        number = self.late.receive()
        if number is None: return
        epoch,step,i = self.sent
        self.recorder.losses[i] = number
        self.arrived = epoch,step,number


class ShowsMetrics(UndoAfterFit):
    "Show what `shown` returns among the Learner's metrics during a fit"
    order = MixedPrecision.order+1 # before the Recorder reads the metrics' names
    first = () # names that stand before all other metrics
    def shown(self):
        "The metrics: name -> function without arguments"
        raise NotImplementedError
    def before_fit(self):
        self.mine = [ValueMetric(f, k) for k,f in self.shown().items()]
        early = [m for m in self.mine if m.name in self.first]
        self.learn.metrics = early + self.learn.metrics + [m for m in self.mine if m.name not in self.first]
    def after_fit(self): self.learn.metrics = self.learn.metrics.filter(lambda m: m not in self.mine)


class LossTerm(ShowsMetrics):
    """A term of the training loss, which also shows the mean of each of its `parts` over the epoch

    A subclass names its parts and calls `add_loss` in `after_loss`. Terms come before all of fastai's callbacks that work on the loss, so
    that `GradientAccumulation` and mixed precision scale all terms alike. They do not run in validation.
    """
    order = GradientAccumulation.order-1
    run_valid = False
    parts = ()
    def shown(self): return {k:lambda k=k: self.part_mean(k) for k in self.parts}
    def before_train(self): self.totals = {k:[0., 0] for k in self.parts}
    def part_mean(self, k):
        "Mean of the part `k` over the steps of the epoch so far"
        total,n = self.totals[k]
        return float(total) / max(n, 1)
    def set_loss(self, loss, **parts):
        "Train on `loss` instead of the batch's loss so far, and log it; `parts` are scalars whose means over the epoch are shown"
        self.learn.loss_grad = loss
        self.learn.loss = loss.detach().clone()
        for k,v in parts.items():
            self.totals[k][0] += v.detach().float()
            self.totals[k][1] += 1
    def add_loss(self, weight, **part):
        "Add `weight` times one part, given as name=value, to the batch's loss"
        value, = part.values()
        self.set_loss(self.loss_grad + weight*value, **part)
