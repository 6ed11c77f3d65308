"""fastai Learners of both stages, and the schedules the paper trains them with."""
import copy
import difflib
import inspect
import os
from contextlib import contextmanager, suppress

import timm
import torch
from fastai.callback.core import CancelEpochException
from fastai.callback.schedule import ParamScheduler
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import params
from fastcore.basics import patch
from fastcore.foundation import L
from torch import nn

from .callbacks import FewShotAccuracy, KeepBest, LightRecorder, RelatednessDistiller, Rotation, Seeded, ShowsMetrics
from .cpu import keep_freed_memory
from .data import EpisodicDL
from .distributed import Distributed, backbone_of, ranks
from .errors import UserError, first_line
from .evaluate import features
from .losses import EpisodicLoss, relatedness
from .optim import sgd
from .precision import Autocast

__all__ = ['check_backbone', 'external_weights', 'create_backbone', 'image_config', 'CosineClassifier', 'GlobalNet', 'CATEGORY_CLASSIFIERS',
           'FewShotLearner', 'global_learner', 'meta_learner', 'poly', 'step_down']

CATEGORY_CLASSIFIERS = ('linear', 'cosine')


def check_backbone(arch, px=None, pretrained=False):
    "Raise UserError unless `arch` is a timm model that takes images of side `px` and, with a tag or `pretrained`, has weights"
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models(), 3)
        raise UserError(f"unknown backbone {arch!r}: give a timm model's name" + (f', such as {", ".join(near)}' if near else ''))
    external_weights(arch, pretrained)
    if px is None: return
    try:
        with torch.no_grad(): features(_build(arch.partition('.')[0], 0, px, 0).eval(), torch.zeros(1, 3, px, px))
    except Exception as e: raise UserError(f'{arch} does not take images of {px} px ({first_line(e)}): choose another backbone') from None

def external_weights(arch, pretrained=False):
    """The weights that `create_backbone` starts from, as timm names them: those of the tag in `arch`, or with `pretrained` of its default

    None for an architecture alone, which starts from random weights. UserError for a tag without weights.
    """
    name,dot,tag = arch.partition('.')
    if not (dot or pretrained): return None
    try: cfg = timm.get_pretrained_cfg(arch)
    except RuntimeError: cfg = None
    if cfg is not None and cfg.has_weights: return f'{name}.{cfg.tag}' if cfg.tag else name
    known = timm.list_pretrained(f'{name}.*')
    raise UserError(f'{arch} has no pretrained weights: give {name} for random ones' +
                    (f', or one of {", ".join(known[:8])}' if known else ''))

def create_backbone(
    arch, # name of a timm model, ours among them; one with a tag, such as resnet18.a1_in1k, has that tag's weights
    num_classes=0, # 0 for features
    px=32, # image side, for networks whose shape depends on it
    seed=0, # of the initial weights; the caller's random state is left alone
    pretrained=False, # use the weights of the default tag if `arch` has no tag
    **kwargs # of `timm.create_model`
):
    "`timm.create_model` with seeded random weights, or with the pretrained ones of a tag (`external_weights`)"
    check_backbone(arch, pretrained=pretrained)
    weights = external_weights(arch, pretrained)
    if weights is None: return _build(arch, num_classes, px, seed, **kwargs)
    try: return _build(weights, num_classes, px, seed, pretrained=True, **kwargs)
    except Exception as e:
        raise UserError(f'the weights of {weights} cannot be had ({first_line(e)}): '
                        'give the name of an architecture, or of weights that can') from None

def _build(arch, num_classes, px, seed, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try: return timm.create_model(arch, num_classes=num_classes, img_size=px, **kwargs)
        except TypeError as e:
            if 'img_size' not in str(e): raise
        torch.manual_seed(seed)
        return timm.create_model(arch, num_classes=num_classes, **kwargs)


class CosineClassifier(nn.Module):
    "scale * cos(h, w_c), the scale learned: features (B, D) -> logits (B, n_classes)"
    def __init__(self, n_features, n_classes, scale=10.):
        super().__init__()
        self.weight,self.scale = nn.Parameter(torch.randn(n_classes, n_features) / n_features**0.5),nn.Parameter(torch.tensor(scale))
    def forward(self, h): return self.scale * relatedness(h, self.weight)


class GlobalNet(nn.Module):
    """The global learner in training: backbone phi with its classifier FC3, and FC4 from category prediction to rotation

    Images (B, 3, H, W) -> category prediction p (B, n_classes); in training, with rotation, (p, r) with r (B, 4) (Eq. 2-4).
    With `classifier='cosine'` FC3 is a `CosineClassifier` in place of the backbone's own, which is left with none.
    """
    def __init__(self, backbone, rotation=True, rotation_from='logits', classifier='linear'):
        super().__init__()
        if rotation_from not in ('logits', 'probabilities'):
            raise UserError(f"rotation_from is 'logits' or 'probabilities', not {rotation_from!r}")
        if classifier not in CATEGORY_CLASSIFIERS: raise UserError(f"classifier is 'linear' or 'cosine', not {classifier!r}")
        self.backbone,self.rotation_from,n_classes = backbone,rotation_from,backbone.num_classes
        self.rotation_head = nn.Linear(n_classes, 4) if rotation else None
        self.classifier = (CosineClassifier(getattr(backbone, 'head_hidden_size', None) or backbone.num_features, n_classes)
                           if classifier == 'cosine' else None)
        if self.classifier: backbone.reset_classifier(0)
    def forward(self, x):
        p = self.classifier(features(self.backbone, x)) if self.classifier else self.backbone(x)
        if self.rotation_head is None or not self.training: return p
        return p,self.rotation_head(p if self.rotation_from == 'logits' else p.softmax(1))

class FewShotLearner(Learner):
    """A Learner whose next fit may begin at `first_epoch`, where a checkpoint left off

    Whatever ends a fit, Ctrl-C too, its callbacks undo what they changed. `validate` is accuracy on the validation classes.
    """
    first_epoch = 0
    def fit(self, *args, **kwargs):
        try: super().fit(*args, **kwargs)
        except BaseException: # fastai calls after_fit for its own Cancel exceptions only
            for cb in self.cbs.filter(lambda cb: isinstance(cb, (Seeded, Autocast, ShowsMetrics, Distributed))):
                with suppress(AttributeError): cb.after_fit() # one whose before_fit was not reached has nothing to undo
            raise
        finally: self.first_epoch = 0
    def validate(self, *args, **kwargs): return L([self.few_shot_accuracy.measure().accuracy])
    @contextmanager
    def distrib_ctx(self, sync_bn=True):
        "Fits inside train on all the processes joined by `processes`; fastai's by the same name cuts batches across episodes"
        if ranks()[1] == 1:
            if int(os.environ.get('WORLD_SIZE', 1)) > 1:
                raise UserError('this is one of several processes that have not joined: put the program inside `with processes():`')
            yield self
            return
        with self.added_cbs(Distributed(sync_bn)): yield self
    def _do_fit(self):
        for epoch in range(self.first_epoch, self.n_epoch):
            self.epoch = epoch
            self._with_events(self._do_epoch, 'epoch', CancelEpochException)

def _body_and_head(model):
    head = L(p for m in (model.backbone.get_classifier(), model.classifier, model.rotation_head) if m for p in params(m))
    ids = {id(p) for p in head}
    return L(L(p for p in params(model) if id(p) not in ids), head)


def image_config(dls):
    "What the images of `dls` are, as timm's `pretrained_cfg` has it: their size and, where they are normalised, mean and std"
    cfg = dict(input_size=tuple(dls.one_batch()[0].shape[1:]), crop_pct=1.)
    norm = next((f for f in dls.train.after_batch.fs if isinstance(f, Normalize)), None)
    return cfg if norm is None else cfg | {k:tuple(v.flatten().tolist()) for k,v in dict(mean=norm.mean, std=norm.std).items()}

def check_dls(dls):
    if not isinstance(dls, DataLoaders):
        raise UserError(f'the data is a {type(dls).__name__}: make DataLoaders with category_dls or episodic_dls')

def _learner(dls, model, loss_func, stage_cbs, seed, amp, keep_best, valid, channels_last, compile, opt_func=sgd, wd=5e-4, cbs=None,
             **kwargs):
    if torch.device(dls.device).type == 'cpu': keep_freed_memory()
    net = getattr(model, 'backbone', model)
    net.pretrained_cfg = getattr(net, 'pretrained_cfg', {}) | image_config(dls) # it says what images the network takes from now on
    if channels_last: model.to(memory_format=torch.channels_last)
    if compile:
        for part in net.children(): part.compile(**(compile if isinstance(compile, dict) else {})) # in place: names and hooks stay
    known = list(inspect.signature(FewShotAccuracy).parameters)
    if wrong := next((k for k in valid if k not in known), None):
        raise UserError(f'valid has no setting {wrong!r}: its settings are {", ".join(known)}')
    cbs = [Seeded(seed), LightRecorder(), *([Autocast()] if amp else []), *stage_cbs, FewShotAccuracy(**valid),
           *([KeepBest()] if keep_best else []), *L(cbs)]
    learn = FewShotLearner(dls, model, loss_func=loss_func, opt_func=opt_func, wd=wd, cbs=cbs, **kwargs)
    learn.recorder.train_metrics,learn.recorder.valid_metrics = True,False # there is no validation loss
    return learn


def global_learner(
    dls, # `category_dls`
    arch, # name of a timm model (with a tag's weights, where it has one), or a timm model with `dls.c` classes
    pretrained=False, # start from the weights of the name's default tag
    rotation=True, # train on four rotations with L_c + L_r
    rotation_weight=1., # of L_r
    rotation_from='logits', # FC4 reads 'logits' or 'probabilities' of the category prediction
    smoothing=0., # of the category labels in L_c
    classifier='linear', # FC3: 'linear', the backbone's own, or 'cosine', which leaves the backbone without one
    seed=0, # of weights, dropout, order and augmentation
    amp=True, # bfloat16, or float16 with scaled gradients, where the device has it
    keep_best=True, # end with the weights of the epoch that was best on the validation classes
    channels_last=True, # convolutions' memory format
    compile=False, # the network by torch.compile, True or its options: slower on the CPUs measured (benchmarks/README.md)
    valid=None, # episodes of the validation classes: n_way=5, k_shot=1, n_query=15, n_episodes=1000, seed=0
    **kwargs # of fastai's `Learner`
) -> Learner:
    "Stage one: a Learner of the global learner phi; `learn.model.backbone` is the network"
    check_dls(dls)
    if isinstance(arch, Learner): arch = backbone_of(arch)
    if not isinstance(arch, str | nn.Module):
        raise UserError(f'the backbone is a {type(arch).__name__}: give the name of a timm model, or one')
    if not isinstance(smoothing, int | float) or not 0 <= smoothing < 1:
        raise UserError(f'smoothing is {smoothing!r}: it must be at least 0 and below 1')
    backbone = create_backbone(arch, dls.c, dls.one_batch()[0].shape[-1], seed, pretrained) if isinstance(arch, str) else arch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GlobalNet(backbone, rotation, rotation_from, classifier)
    return _learner(dls, model, CrossEntropyLossFlat(label_smoothing=smoothing), [Rotation(rotation_weight)] if rotation else [], seed, amp,
                    keep_best,
                    valid or {}, channels_last, compile, splitter=_body_and_head, **kwargs)


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


# ---- schedules --------------------------------------------------------------------------------------------------------

def poly(lr, power=0.9):
    "lr * (1 - pos)^power over training, pos from 0 to 1 (section 4.1)"
    return lambda pos: lr * (1 - pos)**power

def step_down(lr, last=1/3, factor=0.1):
    "lr, times `factor` for the `last` part of training (section 4.1: the last 5 of 15 epochs)"
    return lambda pos: lr * (factor if pos >= 1 - last - 1e-9 else 1)

@patch
def fit_poly(self:Learner, n_epoch, lr=0.05, power=0.9, cbs=None, **kwargs):
    "Fit with the paper's 'poly' rate of stage one"
    self.fit(n_epoch, lr, cbs=L(ParamScheduler({'lr':poly(lr, power)})) + L(cbs), **kwargs)

@patch
def fit_step(self:Learner, n_epoch, lr=1e-3, last=1/3, factor=0.1, cbs=None, **kwargs):
    "Fit with the paper's stepped rate of stage two"
    self.fit(n_epoch, lr, cbs=L(ParamScheduler({'lr':step_down(lr, last, factor)})) + L(cbs), **kwargs)
