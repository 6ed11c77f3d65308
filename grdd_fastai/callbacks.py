"""The callbacks of both stages: seeds, rotation, relatedness distillation, few-shot accuracy."""
import math

import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.tracker import TrackerCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Recorder, ValueMetric
from torch.nn.parallel import DistributedDataParallel

from .data import rows_by_class
from .distributed import backbone_of, ranks, unwrapped
from .errors import UserError
from .evaluate import embed, evaluate, features
from .losses import kl_relatedness, relatedness
from .precision import amp, amp_dtype

__all__ = ['Seeded', 'LightRecorder', 'ShowsMetrics', 'LossTerm', 'Rotation', 'RelatednessDistiller', 'FewShotAccuracy', 'KeepBest',
           'rotate4']


class Seeded(Callback):
    "Make dropout, order and augmentation functions of `seed`, epoch and step; the caller's random state is left alone"
    order = -10
    def __init__(self, seed=0): self.seed,self.epochs_done = seed,0
    def before_fit(self):
        self.run,self.finished = not hasattr(self.learn, 'lr_finder'),0
        self.cpu_state = torch.get_rng_state()
        self.cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    def before_train(self):
        if hasattr(self.dl, 'epoch'): self.dl.epoch = self.epochs_done + self.epoch - 1 # one more begins now
    def before_batch(self):
        step = (self.seed*1_000_003 + self.epochs_done + self.epoch)*1_000_003 + self.iter
        if self.training: torch.manual_seed((step + ranks()[0]*1_000_000_007) % 2**63) # another in each process
    def after_epoch(self): self.finished = self.epoch + 1
    def after_fit(self):
        self.epochs_done += self.finished
        self.run = True
        torch.set_rng_state(self.cpu_state)
        if self.cuda_states: torch.cuda.set_rng_state_all(self.cuda_states)


class LightRecorder(Callback):
    "Turn the Recorder's loss of each step into a number: a small tensor that is kept would keep the memory around it from being used again"
    order,run_valid = Recorder.order + 1,False
    def after_batch(self):
        losses = self.recorder.losses
        if losses and isinstance(losses[-1], torch.Tensor): losses[-1] = losses[-1].item()


class ShowsMetrics(Callback):
    "While fitting, shows what `shown` returns among the Learner's metrics"
    order = MixedPrecision.order+1 # before the Recorder reads the metrics' names
    def shown(self): "Names and functions without arguments"; raise NotImplementedError
    def before_fit(self):
        self.mine = [ValueMetric(f, k) for k,f in self.shown().items()]
        self.learn.metrics = self.learn.metrics + self.mine
    def after_fit(self): self.learn.metrics = self.learn.metrics.filter(lambda m: m not in self.mine)


class LossTerm(ShowsMetrics):
    """Adds terms to the training loss and shows each epoch's mean of every part

    It comes before every callback of fastai that works on the loss, so that `GradientAccumulation` and mixed precision scale all terms
    alike.
    """
    order = GradientAccumulation.order-1
    run_valid,parts = False,()
    def shown(self): return {k:lambda k=k: self.part_mean(k) for k in self.parts}
    def before_train(self): self.totals = {k:[0., 0] for k in self.parts}
    def part_mean(self, k): total,n = self.totals[k]; return float(total) / max(n, 1)
    def set_loss(self, loss, **parts):
        "The batch's loss becomes `loss`, trained on and logged; `parts` go into the epoch's means"
        self.learn.loss_grad = loss
        self.learn.loss = loss.detach().clone()
        for k,v in parts.items(): self.totals[k][0] += v.detach().float(); self.totals[k][1] += 1


# ---- stage one --------------------------------------------------------------------------------------------------------

def rotate4(x):
    "(B, C, H, W) -> (4B, C, H, W): the batch at 0, 90, 180 and 270 degrees"
    return torch.cat([torch.rot90(x, k, (2, 3)) for k in range(4)])


class Rotation(LossTerm):
    "Train on each batch at 0, 90, 180 and 270 degrees; L_c + weight * L_r (Eq. 5-9), the category label kept"
    parts = ('L_c', 'L_r')
    def __init__(self, weight=1.): self.weight = weight
    def before_batch(self):
        self.upright = self.xb,self.yb
        x,y = self.xb[0],self.yb[0]
        self.learn.xb,self.learn.yb = (rotate4(x),),(y.repeat(4),)
        self.angles = torch.arange(4, device=x.device).repeat_interleave(len(x))
    def after_pred(self):
        "Runs after the model and leaves `learn.pred` the category prediction p"
        self.learn.pred,self.rotation_pred = self.pred
    def after_loss(self):
        L_c,L_r = self.loss_grad,F.cross_entropy(self.rotation_pred.float(), self.angles)
        self.set_loss(L_c + self.weight*L_r, L_c=L_c, L_r=L_r)
        self.learn.xb,self.learn.yb = self.upright # other callbacks count and measure the batch's own images
        self.learn.pred = self.pred[:len(self.yb[0])]


# ---- stage two --------------------------------------------------------------------------------------------------------

TEACHER_OUTPUTS = ('features', 'logits', 'probabilities')


class RelatednessDistiller(LossTerm):
    """Distil the frozen `teacher`'s query-support relatedness: kl_weight * L_kl + gamma * L_rt (Eq. 10-15)

    L_rt is the Learner's loss (`EpisodicLoss`). The teacher is in eval mode, gets no gradient, is outside the optimiser and
    on the batch's device; `after_fit` leaves its mode and flags as they were.
    """
    parts = ('L_kl', 'L_rt')
    def __init__(self,
        teacher, # the global learner phi, a timm model or module
        T=0.1, # temperature; it divides the cosines, so T=1/4 multiplies them by 4 (the paper: 4)
        gamma=1., # weight of L_rt (the paper: 0.2)
        decouple=True, # one softmax per support image; False: one over the whole matrix ('w/o RDD')
        kl_weight=5., # weight of L_kl (the paper: 1, of the sum)
        hinton=False, # also weight L_kl by T^2, as Hinton's distillation does
        reverse=False, # KL(student || teacher) instead of KL(teacher || student)
        reduction='mean', # of the groups' KL: 'mean', or 'sum' (Eq. 12)
        center=False, # subtract each episode's mean feature before the cosines
        teacher_view='same', # the teacher sees the 'same' augmented images as the student, or 'clean' ones, embedded once: cheaper
        teacher_output='features', # the teacher's relatedness is of its 'features' h (Eq. 10), 'logits' or 'probabilities' p
        bank=None, # the teacher's features of the clean base images (N, D), where they are known
    ):
        if teacher_output not in TEACHER_OUTPUTS:
            raise UserError(f"teacher_output is one of {', '.join(TEACHER_OUTPUTS)}, not {teacher_output!r}")
        if teacher_output != 'features' and not getattr(teacher, 'num_classes', 0): raise UserError(
            f"teacher_output={teacher_output!r} needs a teacher with its classifier: train it with classifier='linear'")
        for k,v in dict(decouple=decouple, hinton=hinton, reverse=reverse, center=center).items():
            if not isinstance(v, bool): raise UserError(f'{k} is {v!r}: it is True or False')
        for k,v in dict(T=T, gamma=gamma, kl_weight=kl_weight).items():
            if isinstance(v, bool) or not isinstance(v, int | float): raise UserError(f'{k} is {v!r}: it is a number')
        if not 0 < T < math.inf: raise UserError(f'the temperature T is {T}: it must be positive, since it divides the cosines')
        for k,v in dict(gamma=gamma, kl_weight=kl_weight).items():
            if not 0 <= v < math.inf: raise UserError(f'{k} is {v}: it must be at least 0')
        if not isinstance(teacher, torch.nn.Module):
            raise UserError(f'the teacher is a {type(teacher).__name__}: give a network, such as create_backbone or load_network makes')
        if reduction not in ('mean', 'sum'): raise UserError(f"reduction is {reduction!r}: it is 'mean' or 'sum'")
        if teacher_view not in ('clean', 'same'): raise UserError(f"teacher_view is 'clean' or 'same', not {teacher_view!r}")
        if bank is not None and teacher_view != 'clean':
            raise UserError("a bank of the teacher's features is of clean images: give teacher_view='clean' with it")
        self.teacher,self.gamma,self.center,self.teacher_view = teacher,gamma,center,teacher_view
        self.teacher_output,self.bank,self.bank_of = teacher_output,bank,None
        self.kl,self.kl_weight = dict(T=T, decouple=decouple, reverse=reverse, reduction=reduction),kl_weight*(T*T if hinton else 1)

    def before_fit(self):
        super().before_fit()
        self.was = self.teacher.training,[(p, p.requires_grad) for p in self.teacher.parameters()]
        self.rows_epoch = None
        self.teacher.eval().requires_grad_(False).to(self.dls.device)
        bank_of = id(self.teacher),id(self.dls.train.dataset)
        if self.teacher_view == 'clean' and self.bank_of != bank_of:
            if self.bank is None or self.bank_of: self.bank = embed(self.teacher, self.dls.train.plain())[0]
            self.bank,self.bank_of = self.bank.to(self.dls.device),bank_of
            if len(self.bank) != (n := len(self.dls.train.dataset)):
                raise UserError(f'a bank of {len(self.bank)} features for {n} base images: give a row for each')

    @torch.no_grad()
    def teacher_features(self):
        "What the teacher makes of the batch's images, (B, D)"
        h = self.batch_features()
        if self.teacher_output == 'features': return h
        p = self.teacher.get_classifier()(h.float())
        return p.softmax(1) if self.teacher_output == 'probabilities' else p

    def batch_features(self):
        if self.teacher_view == 'same':
            with amp(self.dls.device, amp_dtype(self.learn)): return features(self.teacher, self.xb[0])
        if self.rows_epoch != self.dl.epoch: # the epoch's own draw, once more
            self.rows_epoch,self.rows = self.dl.epoch,torch.as_tensor(self.dl.get_idxs(), device=self.bank.device)
        return self.bank[self.rows[self.iter*self.dl.bs:][:len(self.xb[0])]]

    def after_loss(self):
        split,L_rt = self.learn.loss_func.split,self.loss_grad
        R_e,R_g = (relatedness(*split(h), center=self.center) for h in (self.pred, self.teacher_features()))
        L_kl = kl_relatedness(R_e, R_g, **self.kl)
        self.set_loss(self.kl_weight*L_kl + self.gamma*L_rt, L_kl=L_kl, L_rt=L_rt)

    def after_fit(self):
        super().after_fit()
        training,flags = self.was
        self.teacher.train(training)
        for p,flag in flags: p.requires_grad_(flag)


# ---- both stages ------------------------------------------------------------------------------------------------------

class FewShotAccuracy(ShowsMetrics):
    """After each epoch of a fit, accuracy (%) on seeded episodes of the validation classes

    A loss over classes the network has no outputs for would mean nothing: a fit skips it.
    """
    order = ShowsMetrics.order + 1
    def __init__(self, n_way=5, k_shot=1, n_query=15, n_episodes=1000, seed=0):
        self.episodes = dict(n_way=n_way, k_shot=k_shot, n_query=n_query, n_episodes=n_episodes, seed=seed)
        self.last,self.fitting = float('nan'),False
    def shown(self): return dict(accuracy=lambda: self.last)
    def before_fit(self):
        "Episodes that cannot be drawn are an error now, not after the first epoch"
        super().before_fit()
        self.fitting,e = not hasattr(self.learn, 'gather_preds'),self.episodes
        rows_by_class(self.dls.valid.labels(), e['n_way'], e['k_shot'], e['n_query'], 'the validation set')
    def measure(self):
        "`Evaluation` of the model as it is"
        several = isinstance(self.model, DistributedDataParallel)
        h,y = embed(backbone_of(self.learn), self.dls.valid.plain(), amp_dtype(self.learn), shared=several)
        return evaluate(h, y, **self.episodes, shared=several)
    def after_train(self):
        if not hasattr(self.learn, 'lr_finder'): self.last = self.measure().accuracy
    def before_validate(self):
        if self.fitting: raise CancelValidException()
    def after_fit(self):
        super().after_fit()
        self.fitting = False


class KeepBest(TrackerCallback):
    "Keep the weights of the epoch with the best `monitor` in memory and load them when training ends"
    order = TrackerCallback.order + 1
    def __init__(self, monitor='accuracy', **kwargs): super().__init__(monitor=monitor, **kwargs)
    def before_fit(self): super().before_fit(); self.best_state,self.best_epoch = None,None
    def after_epoch(self):
        super().after_epoch()
        if self.new_best:
            self.best_epoch = self.epoch
            self.best_state = {k:v.detach().clone() for k,v in unwrapped(self.model).state_dict().items()}
    def after_fit(self):
        super().after_fit()
        if self.best_state: self.model.load_state_dict(self.best_state)
        self.best_state = None
