"""Stage two of GRDD, the meta-learner: episodes of base classes, learned from a frozen teacher's relatedness (section 3.3, Eq. 10-15)."""
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastcore.foundation import L
from torch import nn

from .core.device import cpu_seed
from .core.distributed import backbone_of
from .core.errors import UserError
from .data.augment import AUGMENTATIONS, train_augmentation
from .data.blocks import episodic_dls
from .data.cache import FewShotData
from .data.episodes import EpisodicDL
from .distillation import Distill, as_list, distillation
from .fewshot.embed import ViewFeatures, cached_features, view_features
from .losses import EpisodicLoss
from .models.create import create_backbone, feature_size, features, seeing
from .settings import Settings, at_least, between, declared, flag, one_of, positive, recorded, with_settings
from .terms import DistillationTerm
from .training.callbacks import LossTerm
from .training.learner import check_dls, few_shot_learner
from .training.optim import OPTIMISERS
from .training.schedules import SCHEDULES, fit_function

__all__ = ['StageTwo', 'PRESETS', 'get_preset', 'known_features', 'stage_two', 'meta_learner']


@dataclass(frozen=True, kw_only=True)
class StageTwo(Settings):
    """The settings of stage two; the defaults did best on the validation classes (docs/method.md)

    Without `distill` it trains on episodic labels alone, the paper's CL+EL.
    """
    n_way: Annotated[int, 'classes per episode of stage two, at most the base classes that there are', at_least(2),
                     recorded('way'), flag('meta_way')] = 20
    k_shot: Annotated[int, 'support images per class and episode of stage two; the recipes of a single accuracy take their own shot',
                      at_least(1), recorded('shot'), flag('meta_shot')] = 1
    n_query: Annotated[int, 'query images per class and episode of stage two, at most those that there are', at_least(1),
                       recorded('query'), flag('meta_query')] = 6
    n_episodes: Annotated[int, 'episodes per epoch of stage two', between(1, 10**5), recorded('episodes'), flag('episodes')] = 400
    episodes_per_step: Annotated[int, 'episodes per optimiser step of stage two', between(1, 10**4), recorded('per_step')] = 1
    epochs: Annotated[int, 'epochs of stage two', between(1, 10**6), flag('meta_epochs')] = 15
    schedule: Annotated[str, f'learning-rate schedule of stage two: {", ".join(SCHEDULES)}', one_of(*SCHEDULES),
                        flag('meta_schedule')] = 'one_cycle'
    lr: Annotated[float, 'initial or highest learning rate of stage two', positive, flag('meta_lr')] = 2e-2
    opt: Annotated[str, f'optimiser of stage two: {", ".join(OPTIMISERS)}', one_of(*OPTIMISERS), recorded(absent='sgd'),
                   flag('meta_opt')] = 'sgd'
    init: Annotated[str, "weights that the student starts from: cl, its stage one's, or random", one_of('cl', 'random')] = 'cl'
    ema_decay: Annotated[float, 'decay of the exponential moving average of the weights of stage two, which is measured and kept; 0 for '
                         'the weights themselves', at_least(0, below=1), recorded(absent=0.), flag('meta_ema_decay')] = 0.
    scale: Annotated[float, 'logit scale of the regulariser L_rt', positive] = 10.
    mean: Annotated[bool, "L_rt on the mean cosine with a class's support; without, on the sum (Eq. 14)"] = True
    jitter: Annotated[bool, 'colour jitter in both stages', recorded(absent=True)] = True
    augment: Annotated[str, "augmentation of both stages' images", one_of(*AUGMENTATIONS), recorded(absent='albumentations')] = 'batch'
    seed: Annotated[int, 'seed of weights, batches, episodes and augmentation', between(0, 2**32 - 1)] = 0
    distill: Distill|None = Distill()


PRESETS = dict( # docs/method.md says what each setting is and what was measured
    best=StageTwo(), # did best on the validation classes
    muon=StageTwo(opt='muon', lr=1e-2), # best after a stage one by Muon, whose weights SGD hardly moves
    # from random weights, each image related to all others, and time; the package's networks had more of it (their cards say how much)
    patient=StageTwo(opt='muon', lr=2e-2, epochs=30, init='random', distill=Distill(pairs='all', teacher_view='views')),
    paper=StageTwo(n_way=5, n_query=15, schedule='step', lr=1e-3, scale=1., mean=False, # the paper's words; L_rt reads the sums as they are
                   distill=Distill(T=4., gamma=0.2, kl_weight=1., reduction='sum', teacher_view='clean')))
LABELS_ALONE = dict(best=dict(lr=1e-2), muon=dict(lr=3e-3)) # what CL+EL does best with, where that differs

# type of the parameter `preset` of a program, with its help
Preset = Annotated[str, "preset of stage two's settings: best, muon, patient or paper, see docs/method.md"]


def get_preset(name:str, labels_alone:bool=False) -> StageTwo:
    "The settings of stage two by the name of a preset, for GRDD or for CL+EL (`labels_alone`)"
    if name not in PRESETS: raise UserError(f'unknown preset {name!r}: it is one of {", ".join(PRESETS)}')
    return PRESETS[name].but(**LABELS_ALONE.get(name, {})) if labels_alone else PRESETS[name]


def check_view(two):
    "Raise UserError if `two` has a number of views without known views, or known views with another augmentation than batch"
    d = two.distill
    if d.views != declared(Distill)['views'].default and d.teacher_view != 'views':
        raise UserError(f"views has no effect with teacher_view={d.teacher_view!r}: leave it out, or give teacher_view='views'")
    if d.teacher_view == 'views' and two.augment != 'batch':
        raise UserError(f"teacher_view='views' needs the augmentation of batches: leave out augment={two.augment!r}")

def check_teacher(phi, two):
    "Raise UserError if the settings `two` contradict each other, or need what a teacher with the settings `phi` of stage one does not have"
    if not two.distill: return
    check_view(two)
    if two.distill.teacher_output != 'features' and phi.head != 'linear':
        raise UserError(f"teacher_output={two.distill.teacher_output!r} needs a teacher with its classifier: train it with head='linear'")


def episode_size(data:FewShotData, s:StageTwo) -> tuple[int, int]:
    "Classes per episode and queries per class that the base classes can fill, at most those of the settings `s`"
    n_images = np.bincount(data.train.y)
    return min(s.n_way, len(n_images)),max(1, min(s.n_query, int(n_images.min()) - s.k_shot))


def known_features(
    teacher:nn.Module|Learner|list, # the trained global learner, or a list of several
    data:FewShotData, # FewShotData
    s:StageTwo, # the settings
    cache:str|Path|None=None, # folder for the features; None: `default_cache()`
    amp:bool=True, after_each:Callable|None=None, # see `view_features`
) -> torch.Tensor|ViewFeatures|list|None:
    """The teacher's features of the base images as far as the settings allow to know them before the training: computed once, then read

    They are of the clean images for teacher_view='clean' and of the views for 'views', a list for several teachers, and None otherwise.
    UserError if the cache folder cannot be written.
    """
    view,mirror = s.distill.teacher_view,s.distill.teacher_mirror
    check_view(s)
    if view == 'same': return None
    def of_one(t):
        net = network_of(t)
        if view == 'views': return view_features(net, data, s.distill.n_views, s.jitter, cache, amp, mirror, after_each)
        return cached_features(seeing(net, data.px, data.stats), data, 'train', stats=data.stats, cache=cache, mirror=mirror)[0]
    return [of_one(t) for t in teacher] if isinstance(teacher, list | tuple) else of_one(teacher)


# the settings that `meta_learner` does not take
OF_DATA_AND_FIT = ('n_way', 'k_shot', 'n_query', 'n_episodes', 'episodes_per_step', 'epochs', 'schedule', 'lr', 'opt', 'init', 'jitter',
                   'augment', 'views')


def stage_two(
    data:FewShotData,
    s:StageTwo, # the settings
    # the network of stage one to start from, with `s.init='random'` its architecture alone; or the name of a timm model
    student:str|nn.Module,
    teacher:nn.Module|list|None=None, # the frozen teacher, or a list of several; None trains on episodic labels alone (CL+EL)
    # what `known_features` gives for the teacher, or a function without arguments that gives it when a fit begins
    teacher_features:torch.Tensor|ViewFeatures|list|Callable|None=None,
    **kwargs # of `meta_learner`
) -> tuple[Learner, Callable]:
    """(Learner, fit) of stage two: `fit(learn)` trains `learn.model`

    With `s.distill=None` it trains on episodic labels alone, too. An episode has as many classes and queries as there are, where the
    settings ask for more.
    """
    n_way,n_query = episode_size(data, s)
    dls = episodic_dls(data, n_way, s.k_shot, n_query, s.n_episodes, s.episodes_per_step,
                       aug=train_augmentation(data.px, s.jitter, s.augment), seed=s.seed,
                       views=s.distill.n_views if teacher is not None and s.distill else None)
    student = network_of(student)
    if s.init == 'random':
        arch = student if isinstance(student, str) else (getattr(student, 'pretrained_cfg', None) or {}).get('architecture')
        if arch is None: raise UserError(f'the student is a {type(student).__name__} without a timm name: its weights cannot be drawn anew')
        student = create_backbone(arch, 0, data.px, s.seed)
    if teacher is None or s.distill is None:
        s = s.but(distill=None)
        teacher = teacher_features = None
    elif teacher_features is None and s.distill.teacher_view == 'views':
        teacher_features = partial(known_features, teacher, data, s, amp=kwargs.get('amp', True))
    own = {k:v for k,v in s.values().items() if k not in OF_DATA_AND_FIT}
    learn = meta_learner(dls, student, teacher, teacher_features=teacher_features, opt_func=OPTIMISERS[s.opt], **own, **kwargs)
    return learn,fit_function(s, s.episodes_per_step)


@with_settings(s=StageTwo, but=OF_DATA_AND_FIT)
def meta_learner(
    dls:DataLoaders, # DataLoaders of `episodic_dls`
    # the network psi to start from, which is copied: stage one's backbone, a Learner of it, or the name of a timm model
    student:str|nn.Module|Learner,
    # the trained global learner phi, or a list of several; None trains on episodic labels alone (CL+EL)
    teacher:nn.Module|Learner|list|None=None,
    s=None, # the settings of `StageTwo` and `Distill` that concern the loss
    # features (N, D) that the teacher has of the clean base images, where they are known, or `view_features` for teacher_view='views';
    # a list for several teachers; or a function without arguments that gives them when a fit begins
    teacher_features:torch.Tensor|ViewFeatures|list|Callable|None=None,
    valid:dict|None=None, # episodes of the validation classes: n_way=5, k_shot as in training, n_query=15, n_episodes=1000, seed=0
    **kwargs # of `few_shot_learner`, such as amp, keep_best and cbs, and of fastai's `Learner`
) -> Learner:
    """Learner of the meta-learner psi; `learn.model` is the network, or a `StudentNet` with it if a term trains layers of its own

    UserError for data, networks or settings that do not fit.
    """
    check_dls(dls)
    if 'loss_func' in kwargs:
        raise UserError('the loss of stage two is a sum of terms: change it by gamma and kl_weight, and add terms of your own by cbs=')
    e = dls.train
    if not isinstance(e, EpisodicDL): raise UserError('meta_learner trains on episodes: make dls with episodic_dls')
    student = network_of(student)
    if not isinstance(student, str | nn.Module):
        raise UserError(f'the student is a {type(student).__name__}: give a network, a Learner of one, or the name of a timm model')
    model = create_backbone(student, 0, dls.one_batch()[0].shape[-1], s.seed) if isinstance(student, str) else copy.deepcopy(student)
    if hasattr(model, 'reset_classifier'): model.reset_classifier(0)
    if isinstance(teacher, list | tuple) and not teacher: raise UserError('the list of teachers is empty: give at least one, or None')
    if teacher is None and (teacher_features is not None or s.distill not in (None, Distill())):
        raise UserError('a setting of the distillation is given without a teacher: give teacher=, or neither for episodic labels alone')
    terms = []
    if teacher is not None:
        teachers = [network_of(t) for t in as_list(teacher)]
        terms = [*distillation(teachers, s.distill, teacher_features), ShowL_rt()]
        kwargs['cbs'] = [cb() if isinstance(cb, type) else cb for cb in L(kwargs.get('cbs'))]
        with cpu_seed(s.seed): model = with_heads(model, [*terms, *kwargs['cbs']], teachers, dls.c)
    gamma = s.distill.gamma if terms else 1.
    return few_shot_learner(dls, model, EpisodicLoss(e.n_way, e.k_shot, e.n_query, s.scale, s.mean, gamma), terms, seed=s.seed,
                            ema_decay=s.ema_decay, valid=dict(k_shot=e.k_shot) | (valid or {}), **kwargs)


class StudentNet(nn.Module):
    "The student during training: the backbone psi, and `heads`, the layers that loss terms train beside it, by the name of the term"
    def __init__(self, backbone:nn.Module, heads:dict):
        super().__init__()
        self.backbone,self.heads = backbone,nn.ModuleDict(heads)
    def forward(self, x): return features(self.backbone, x)

def network_of(o):
    "The network of a Learner or a `StudentNet`; anything else as it is"
    if isinstance(o, Learner): return backbone_of(o)
    return o.backbone if isinstance(o, StudentNet) else o

def with_heads(student, cbs, teachers, n_classes):
    "Wrap the student in a `StudentNet` if one of the callbacks is a term with layers of its own; return the student itself otherwise"
    heads = {}
    for term in cbs:
        if not isinstance(term, DistillationTerm) or not term.trains_layers(): continue
        heads[term.name] = term.make_layers(feature_size(student), [feature_size(t) for t in teachers], n_classes)
    return StudentNet(student, heads) if heads else student


class ShowL_rt(LossTerm):
    "Show each epoch's mean of L_rt (Eq. 13), without its weight gamma"
    parts = ('L_rt',)
    def after_loss(self): self.set_loss(self.loss_grad, L_rt=self.learn.loss_func.L_rt)
