"""Stage one of GRDD, the global learner: categories and rotations (Eq. 2-9)."""
import torch
import torch.nn.functional as F
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import params
from fastcore.foundation import L
from torch import nn

from .core.distributed import backbone_of
from .core.errors import UserError
from .losses import relatedness
from .models.create import create_backbone, features
from .training.callbacks import LossTerm
from .training.learner import _learner, check_dls

__all__ = ['CATEGORY_CLASSIFIERS', 'CosineClassifier', 'GlobalNet', 'global_learner', 'rotate4', 'Rotation']


CATEGORY_CLASSIFIERS = ('linear', 'cosine')


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

def _body_and_head(model):
    head = L(p for m in (model.backbone.get_classifier(), model.classifier, model.rotation_head) if m for p in params(m))
    ids = {id(p) for p in head}
    return L(L(p for p in params(model) if id(p) not in ids), head)


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
