"""Stage one of GRDD, the global learner: categories and rotations of the base classes (section 3.2, Eq. 2-9)."""
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.torch_core import params
from fastcore.foundation import L
from torch import nn

from .core.device import cpu_seed
from .core.distributed import backbone_of, unwrapped
from .core.errors import UserError
from .data.augment import AUGMENTATIONS, train_augmentation
from .data.blocks import category_dls, default_bs
from .data.cache import FewShotData
from .losses import relatedness
from .models.create import create_backbone, feature_size, features
from .models.resnet12 import set_drop_steps
from .settings import Bound, Settings, at_least, between, declared, flag, heading, one_of, positive, recorded, with_settings
from .training.callbacks import LossTerm
from .training.learner import BaseClassLoss, check_dls, few_shot_learner
from .training.optim import OPTIMISERS
from .training.schedules import SCHEDULES, fit_function

__all__ = ['StageOne', 'stage_one', 'global_learner', 'GlobalNet', 'CosineHead', 'FeatureTerm', 'Rotation', 'rotate4']


@dataclass(frozen=True, kw_only=True)
class StageOne(Settings):
    "The settings of stage one; the defaults are the paper's (section 4.1)"
    arch: Annotated[str, 'timm model of the global learner', flag(None), heading('{}')] = 'resnet12'
    pretrained: Annotated[bool, "start from the default pretrained weights of the networks' names; a name with a tag, such as "
                          "resnet18.a1_in1k, always starts from that tag's weights", recorded(absent=False)] = False
    epochs: Annotated[int, 'epochs of stage one', between(1, 10**6), heading('{} epochs')] = 90
    schedule: Annotated[str, f'learning-rate schedule of stage one: {", ".join(SCHEDULES)}', one_of(*SCHEDULES), heading('{}')] = 'poly'
    lr: Annotated[float, 'initial or highest learning rate of stage one', positive, heading('lr {}')] = 0.05
    warmup: Annotated[float, 'epochs at the beginning of schedule poly in which the learning rate rises from 0, for a training that would '
                      'diverge', at_least(0), recorded(absent=0.)] = 0.
    opt: Annotated[str, f'optimiser of stage one: {", ".join(OPTIMISERS)}', one_of(*OPTIMISERS),
                   recorded(absent='sgd'), heading('{}')] = 'sgd'
    bs: Annotated[int|None, 'images per batch of stage one, before rotation (64, or 1% of fewer than 6,400 base images, at least 16)',
                  between(1, 10**6), heading('batch {}')] = None
    head: Annotated[str, "classifier of stage one, FC3: linear, the network's own, or cosine", one_of('linear', 'cosine'),
                    recorded('classifier', absent='linear'), heading('{} head')] = 'linear'
    rotation: Annotated[bool, 'train on rotated images, with L_c + L_r',
                        heading(lambda on: 'rotation' if on else 'no rotation')] = True
    rotations: Annotated[int, 'rotations of each image in a step: 4, as in the paper; or 1, which costs a quarter, because each quarter of '
                         'a batch is turned by another angle', Bound('1 or 4', lambda v: v in (1, 4)), recorded(absent=4),
                         heading(lambda n: '' if n == 4 else 'each image at one angle')] = 4
    rotation_weight: Annotated[float, 'weight of the rotation loss L_r', at_least(0), recorded(absent=1.)] = 1.
    rotation_from: Annotated[str, 'what FC4 reads of the category prediction: logits or probabilities', one_of('logits', 'probabilities'),
                             heading(lambda v: '' if v == 'logits' else f'rotation from {v}')] = 'logits'
    smoothing: Annotated[float, 'label smoothing of the categories in stage one', at_least(0, below=1), recorded(absent=0.)] = 0.
    drop_ramp: Annotated[float|None, 'share of the steps of stage one, such as 0.5, after which the DropBlock of a ResNet-12 has its '
                         'full rate (after 40,000 steps, as in official code)', Bound('above 0 and at most 1', lambda v: 0 < v <= 1),
                         recorded(absent=None)] = None
    ema_decay: Annotated[float, 'decay of the exponential moving average of the weights of stage one, which is measured and kept; 0 for '
                         'the weights themselves', at_least(0, below=1), recorded(absent=0.)] = 0.
    jitter: Annotated[bool, 'colour jitter in both stages', recorded(absent=True)] = True
    augment: Annotated[str, f"augmentation of both stages' images: {' or '.join(AUGMENTATIONS)}; batch works on a batch at once, "
                       'albumentations on one image after the other', one_of(*AUGMENTATIONS), recorded(absent='albumentations'),
                       heading(lambda v: '' if v == 'batch' else v)] = 'batch'
    seed: Annotated[int, 'seed of weights, batches, episodes, augmentation, and of the split of a folder of class folders',
                    between(0, 2**32 - 1), heading(lambda v: '')] = 0

    def __post_init__(self):
        super().__post_init__()
        of_rotation = ('rotations', 'rotation_weight', 'rotation_from')
        useless = next((k for k in of_rotation if getattr(self, k) != declared(StageOne)[k].default), None)
        if useless and not self.rotation: raise UserError(f'{useless} has no effect without rotation: leave one of them out')
        if self.warmup and self.schedule != 'poly':
            raise UserError(f'warmup has no effect with schedule={self.schedule!r}: leave one of them out')
        if self.warmup >= self.epochs: raise UserError(f'warmup is {self.warmup:g} of {self.epochs} epochs: it must be shorter')


# type of the parameter `teacher_epochs` of a program, with its help and its bound
TeacherEpochs = Annotated[int, "epochs of the teacher's stage one (as --epochs)", between(1, 10**6)]
OF_DATA_AND_FIT = ('arch', 'epochs', 'schedule', 'lr', 'warmup', 'opt', 'bs', 'drop_ramp', 'jitter', 'augment') # not of `global_learner`


def stage_one(data:FewShotData, s:StageOne, start:nn.Module|None=None, **kwargs) -> tuple[Learner, Callable]:
    """(Learner, fit) of stage one on a `FewShotData` for the settings `s`: `fit(learn)` trains `learn.model.backbone`

    It is a copy of the trained network `start`, if there is one.
    """
    dls = category_dls(data, s.bs or default_bs(data), aug=train_augmentation(data.px, s.jitter, s.augment), seed=s.seed)
    own = {k:v for k,v in s.values().items() if k not in OF_DATA_AND_FIT}
    if start is not None:
        start = copy.deepcopy(start)
        with cpu_seed(s.seed):
            if start.num_classes != dls.c: start.reset_classifier(dls.c)
    learn = global_learner(dls, s.arch if start is None else start, opt_func=OPTIMISERS[s.opt], **own, **kwargs)
    if s.drop_ramp is not None: set_drop_steps(learn.model, max(1, round(s.drop_ramp*s.epochs*len(dls.train))))
    return learn,fit_function(s, dls.train.bs)


@with_settings(s=StageOne, but=OF_DATA_AND_FIT)
def global_learner(
    dls:DataLoaders, # DataLoaders of `category_dls`
    arch:str|nn.Module|Learner, # name of a timm model, or a timm model with `dls.c` classes
    s:StageOne, # the settings of `StageOne` that concern the network and its loss
    loss_func:Callable|None=None, # loss of the categories, a function (logits, classes) -> scalar; None: cross-entropy
    **kwargs # of `few_shot_learner`, such as amp, keep_best and valid, and of fastai's `Learner`
) -> Learner:
    """Learner of the global learner phi; `learn.model.backbone` is the network

    UserError for data, a network or settings that do not fit.
    """
    check_dls(dls)
    if isinstance(arch, Learner): arch = backbone_of(arch)
    if not isinstance(arch, str | nn.Module):
        raise UserError(f'the backbone is a {type(arch).__name__}: give the name of a timm model, or one')
    if s.pretrained and not isinstance(arch, str): raise UserError('pretrained has no effect on a network that is there: give its name')
    backbone = create_backbone(arch, dls.c, dls.one_batch()[0].shape[-1], s.seed, s.pretrained) if isinstance(arch, str) else arch
    kwargs['cbs'] = [cb() if isinstance(cb, type) else cb for cb in L(kwargs.get('cbs'))]
    with cpu_seed(s.seed):
        model = GlobalNet(backbone, s.rotation, s.rotation_from, s.head)
        for term in kwargs['cbs']:
            if isinstance(term, FeatureTerm): model.heads[term.name] = term.make_layers(feature_size(backbone), dls.c)
    terms = [Rotation(s.rotation_weight, s.rotations)] if s.rotation else []
    if loss_func is not None and s.smoothing: raise UserError('smoothing belongs to the cross-entropy: give it or loss_func')
    loss_func = BaseClassLoss(label_smoothing=s.smoothing) if loss_func is None else loss_func
    return few_shot_learner(dls, model, loss_func, terms, seed=s.seed, splitter=body_and_head,
                            ema_decay=s.ema_decay, **kwargs)


class CosineHead(nn.Module):
    "scale * cos(h, w_c) with a learned scale: features (B, D) -> logits (B, n_classes)"
    def __init__(self, n_features, n_classes, scale=10.):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_classes, n_features) / n_features**0.5)
        self.scale = nn.Parameter(torch.tensor(scale))
    def forward(self, h): return self.scale * relatedness(h, self.weight)


class GlobalNet(nn.Module):
    """The global learner in training: the backbone phi with its head FC3, and FC4, which reads the rotation from the category prediction

    Images (B, 3, H, W) -> category prediction p (B, n_classes); in training with rotation (p, r), where r is (B, 4) (Eq. 2-4). With
    `head='cosine'` a `CosineHead` takes the place of the backbone's own classifier, and the backbone is left without one.
    """
    def __init__(self, backbone:nn.Module, rotation:bool=True, rotation_from:str='logits', head:str='linear'):
        super().__init__()
        for k,v in dict(rotation=rotation, rotation_from=rotation_from, head=head).items(): declared(StageOne)[k].checked(v)
        n_classes = backbone.num_classes
        self.backbone,self.rotation_from = backbone,rotation_from
        self.rotation_head = nn.Linear(n_classes, 4) if rotation else None
        self.classifier = CosineHead(feature_size(backbone), n_classes) if head == 'cosine' else None
        if self.classifier: backbone.reset_classifier(0)
        self.heads = nn.ModuleDict() # layers of loss terms (`FeatureTerm`), by the name of the term
    def forward(self, x):
        p = self.classifier(features(self.backbone, x)) if self.classifier else self.backbone(x)
        if self.rotation_head is None or not self.training: return p
        return p,self.rotation_head(p if self.rotation_from == 'logits' else p.softmax(1))

def body_and_head(model):
    "Parameter groups of a `GlobalNet`: the network's body, then its heads"
    own = model.backbone.get_classifier() if hasattr(model.backbone, 'get_classifier') else None
    heads = (own, model.classifier, model.rotation_head, *model.heads.values())
    head = L(p for m in heads if m for p in params(m))
    ids = {id(p) for p in head}
    return L(L(p for p in params(model) if id(p) not in ids), head)


class FeatureTerm(LossTerm):
    """A term of stage one's loss that trains layers of its own on the features of a batch

    A subclass returns the layers in `make_layers` and finds them in `own_layers`; `h` are the features (B, D) in float32.
    """
    def make_layers(self, n_features:int, n_classes:int) -> nn.Module:
        "Make the layers for features of the size `n_features` and `n_classes` base classes. A recipe does not save them."
        raise NotImplementedError
    def before_fit(self):
        super().before_fit()
        model = unwrapped(self.model)
        if self.name not in model.heads:
            raise UserError(f'{type(self).__name__} trains layers of its own: give it when the Learner is made, global_learner(..., cbs=)')
        self.own_layers = model.heads[self.name]
        self.hook = (model.classifier or model.backbone.get_classifier()).register_forward_pre_hook(self.keep)
    def keep(self, module, args): self.h = args[0].float()
    def after_fit(self):
        super().after_fit()
        self.hook.remove()
        self.h = None


def rotate4(x):
    "(B, C, H, W) -> (4B, C, H, W): the batch at 0, 90, 180 and 270 degrees"
    return torch.cat([torch.rot90(x, k, (2, 3)) for k in range(4)])


def rotate_quarters(x):
    "(B, C, H, W) -> (B, C, H, W): the first quarter of the batch at 0 degrees, the next ones at 90, 180 and 270 degrees"
    cuts = [-(-k*len(x)//4) for k in range(5)]
    return torch.cat([torch.rot90(x[a:b], k, (2, 3)) for k,(a,b) in enumerate(zip(cuts, cuts[1:], strict=False))])


class Rotation(LossTerm):
    """Train on each batch at 0, 90, 180 and 270 degrees with L_c + weight * L_r (Eq. 5-9); a rotated image keeps its category label

    With `rotations=1` each quarter of the batch is turned by one of the four angles (`rotate_quarters`).
    """
    parts = ('L_c', 'L_r')
    def __init__(self, weight:float=1., rotations:int=4):
        self.weight = weight
        self.rotations = declared(StageOne)['rotations'].checked(rotations)
    def before_batch(self):
        self.upright = self.xb,self.yb
        x,y = self.xb[0],self.yb[0]
        if self.rotations == 4: x,y = rotate4(x),y.repeat(4)
        else: x = rotate_quarters(x)
        self.learn.xb,self.learn.yb = (x,),(y,)
        self.angles = torch.arange(len(x), device=x.device)*4 // len(x)
    def after_pred(self):
        "Runs after the model and leaves the category prediction p in `learn.pred`"
        self.learn.pred,self.rotation_pred = self.pred
    def after_loss(self):
        L_c = self.loss_grad
        L_r = F.cross_entropy(self.rotation_pred.float(), self.angles)
        self.set_loss(L_c + self.weight*L_r, L_c=L_c, L_r=L_r)
        self.learn.xb,self.learn.yb = self.upright # other callbacks count and measure the batch's own images
        self.learn.pred = self.pred[:len(self.yb[0])]
