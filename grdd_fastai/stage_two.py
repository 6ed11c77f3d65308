"""Stage two of GRDD, the meta-learner: relatedness decoupled-distillation on episodes (Eq. 10-15)."""
import copy
import inspect
import math

import torch
from fastai.learner import Learner
from torch import nn

from .core.device import amp
from .core.distributed import backbone_of
from .core.errors import UserError
from .data.episodes import EpisodicDL
from .fewshot.embed import embed
from .losses import EpisodicLoss, kl_relatedness, relatedness
from .models.create import create_backbone, features
from .training.callbacks import LossTerm, amp_dtype
from .training.learner import _learner, check_dls

__all__ = ['meta_learner', 'RelatednessDistiller']


def meta_learner(
    dls, # `episodic_dls`
    student, # the network psi to start from (copied): stage one's backbone, or a timm model's name
    teacher=None, # the trained global learner phi; None trains on episodic labels alone (CL+EL)
    T=0.1, # temperature; it divides the cosines (the paper: 4, see docs/readings.md)
    gamma=1., # weight of L_rt (the paper: 0.2)
    scale=10., # logit scale of L_rt
    mean=True, # L_rt on the mean cosine per class, rather than the sum (Eq. 14); the same for one shot
    seed=0, # of dropout, episodes and augmentation
    amp=True, # bfloat16, or float16 with scaled gradients, where the device has it
    keep_best=True, # end with the weights of the epoch that was best on the validation classes
    channels_last=True, # convolutions' memory format
    compile=False, # the network by torch.compile, True or its options: slower on the CPUs measured (benchmarks/README.md)
    valid=None, # episodes of the validation classes: n_way=5, k_shot as in training, n_query=15, n_episodes=1000, seed=0
    distill=None, # further settings of `RelatednessDistiller`: decouple, kl_weight, hinton, reverse, ...
    **kwargs # of fastai's `Learner`
) -> Learner:
    "Stage two: a Learner of the meta-learner psi; `learn.model` is the network"
    check_dls(dls)
    e = dls.train
    if not isinstance(e, EpisodicDL): raise UserError('meta_learner trains on episodes: make dls with episodic_dls')
    model = create_backbone(student, 0, dls.one_batch()[0].shape[-1], seed) if isinstance(student, str) else copy.deepcopy(student)
    if hasattr(model, 'reset_classifier'): model.reset_classifier(0)
    if teacher is None and distill: raise UserError('distill is given without a teacher: give both, or neither for episodic labels alone')
    if isinstance(teacher, Learner): teacher = backbone_of(teacher)
    if isinstance(student, Learner): student = backbone_of(student)
    if not isinstance(student, str | nn.Module):
        raise UserError(f'the student is a {type(student).__name__}: give a network, a Learner of one, or the name of a timm model')
    if distill is not None and not isinstance(distill, dict): raise UserError(f'distill is {distill!r}: give a dict of settings')
    known = list(inspect.signature(RelatednessDistiller).parameters)[3:]
    if wrong := next((k for k in distill or {} if k not in known), None):
        raise UserError(f'distill has no setting {wrong!r}: its settings are {", ".join(known)}')
    distiller = [] if teacher is None else [RelatednessDistiller(teacher, T=T, gamma=gamma, **(distill or {}))]
    return _learner(dls, model, EpisodicLoss(e.n_way, e.k_shot, e.n_query, scale, mean), distiller, seed, amp, keep_best,
                    {'k_shot':e.k_shot, **(valid or {})}, channels_last, compile, **kwargs)


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
