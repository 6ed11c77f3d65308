"""timm models by name, their features, and the images that they take."""
import difflib
import math
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import timm
import torch
import torch.nn.functional as F

from ..core.device import cpu_seed
from ..core.errors import UserError, first_line
from ..core.hub import hub_host, quick_offline
from ..core.storage import MAX_SIDE

__all__ = ['check_backbone', 'pretrained_tag', 'create_backbone', 'check_input_config', 'input_config', 'seeing', 'features',
           'feature_size']


def check_backbone(arch, px=None, pretrained=False):
    "Raise UserError unless `arch` is a timm model, takes images of side `px`, and has weights if they are asked for (tag or `pretrained`)"
    if not timm.is_model(arch):
        near = ', '.join(difflib.get_close_matches(arch, timm.list_models(), 3))
        raise UserError(f"unknown backbone {arch!r}: give a timm model's name" + (f', such as {near}' if near else ''))
    pretrained_tag(arch, pretrained)
    if px is None: return
    try:
        with torch.no_grad(): features(_build(arch.partition('.')[0], 0, px, 0).eval(), torch.zeros(1, 3, px, px))
    except Exception as e: raise UserError(f'{arch} does not take images of {px} px ({first_line(e)}): choose another backbone') from None

def pretrained_tag(arch:str, pretrained:bool=False) -> str|None:
    """timm's name (arch.tag) of the weights that `create_backbone` starts from, or None for random weights

    The tag is that in `arch`, or the default tag if `arch` has none and `pretrained` is True. UserError for a tag without weights.
    """
    name,dot,tag = arch.partition('.')
    if not (dot or pretrained): return None
    try: cfg = timm.get_pretrained_cfg(arch)
    except RuntimeError: cfg = None
    if cfg is not None and cfg.has_weights: return f'{name}.{cfg.tag}' if cfg.tag else name
    known = ', '.join(timm.list_pretrained(f'{name}.*')[:8])
    raise UserError(f'{arch} has no pretrained weights: give {name} for random ones' + (f', or one of {known}' if known else ''))

def create_backbone(
    arch:str, # name of a timm model (ours are registered there); a name with a tag, such as resnet18.a1_in1k, loads the weights of the tag
    num_classes:int=0, # outputs of the classifier; 0: no classifier, the output is the features
    px:int=32, # side of the images in pixels, for networks whose shape depends on it
    seed:int=0, # seed of the initial weights; the caller's random state is not changed
    pretrained:bool=False, # whether the weights of the default tag are loaded if `arch` has no tag
    **kwargs # further arguments of `timm.create_model`
) -> torch.nn.Module:
    "`timm.create_model` with seeded random weights or pretrained weights (`pretrained_tag`); UserError if that fails"
    check_backbone(arch, pretrained=pretrained)
    weights = pretrained_tag(arch, pretrained)
    if weights is None: return _build(arch, num_classes, px, seed, **kwargs)
    here = timm.get_pretrained_cfg(weights).file # in an installed package
    with nullcontext(True) if here else quick_offline() as online:
        try: return _build(weights, num_classes, px, seed, pretrained=True, **kwargs)
        except Exception as e:
            if not online: raise not_on_this_machine(f'the weights of {weights}') from None
            raise UserError(f'the weights of {weights} cannot be loaded ({first_line(e)}): '
                            'give the name of an architecture, or of weights that can') from None

def not_on_this_machine(what):
    "A UserError for weights that would have to be downloaded without a connection"
    return UserError(f'{what} are not on this machine, and {hub_host()} cannot be reached: connect to it once, which keeps them here, '
                     'or give convnet4.grdd_cifarfs, which is part of the package')

def _build(arch, num_classes, px, seed, **kwargs):
    with cpu_seed(seed):
        try: return timm.create_model(arch, num_classes=num_classes, img_size=px, **kwargs)
        except TypeError as e:
            if 'img_size' not in str(e): raise
    with cpu_seed(seed): return timm.create_model(arch, num_classes=num_classes, **kwargs)

def check_input_config(px, mean, std, crop_pct=1., interpolation='bicubic', crop_mode='center'):
    "The entries of `pretrained_cfg` about images, as a dict: size, mean, std, crop and interpolation; ValueError for an impossible value"
    def numbers(v): return isinstance(v, list | tuple) and len(v) == 3 and all(isinstance(n, int | float) and math.isfinite(n) for n in v)
    if type(px) is not int or not 1 <= px <= MAX_SIDE: raise ValueError(f'images of {px!r} px: from 1 to {MAX_SIDE} can be')
    if not numbers(mean) or not numbers(std) or min(std) <= 0:
        raise ValueError(f'mean {mean!r}, std {std!r}: three numbers each, those of std positive')
    if not isinstance(crop_pct, int | float) or not 0 < crop_pct <= 1: raise ValueError(f'crop_pct {crop_pct!r}: above 0, at most 1')
    if interpolation not in ('bicubic', 'bilinear', 'nearest', 'lanczos', 'box', 'hamming', 'random'):
        raise ValueError(f'interpolation {interpolation!r} is none')
    if crop_mode not in ('center', 'squash', 'border'): raise ValueError(f'crop_mode {crop_mode!r} is none')
    return dict(input_size=(3, px, px), mean=tuple(mean), std=tuple(std), crop_pct=crop_pct, interpolation=interpolation,
                crop_mode=crop_mode)

def input_config(net):
    "Side in pixels, mean and std of the images that a timm network takes, from its `pretrained_cfg`; UserError if that lacks them"
    cfg = getattr(net, 'pretrained_cfg', None)
    if not cfg or not {'input_size', 'mean', 'std'} <= cfg.keys():
        raise UserError(f'a {type(net).__name__} does not say what images it takes (pretrained_cfg): '
                        'give a timm model, or set input_size, mean and std there')
    return cfg['input_size'][1],list(cfg['mean']),list(cfg['std'])


class Converted(torch.nn.Module):
    """Features (B, D) of the network `net`, whose images are first made what it wants

    The images are enlarged or reduced to `side` pixels, and normalised by mean and std `to` instead of `stats`, if these are given.
    """
    def __init__(self, net, side, stats=None, to=None):
        super().__init__()
        self.net,self.side = net,side
        # buffers move with the network, and are part of what identifies its features
        self.register_buffer('stats', None if to is None else torch.tensor([*stats, *to]))
        self.register_buffer('to_side', torch.tensor(side))
    def forward(self, x):
        if self.stats is not None:
            mean,std,to_mean,to_std = self.stats.view(4, 1, -1, 1, 1)
            x = (x*std + mean - to_mean) / to_std
        if x.shape[-1] != self.side: x = F.interpolate(x, (self.side, self.side), mode='bicubic', antialias=True)
        return features(self.net, x)

def seeing(net:torch.nn.Module, side:int, stats:Sequence|None=None) -> torch.nn.Module:
    """The network for images (B, 3, side, side) that are normalised by `stats` (mean, std), or from 0 to 1: itself, or a `Converted` one

    The network's `pretrained_cfg` says the side, mean and std that it wants. What it does not say stays as it is.
    """
    cfg = getattr(net, 'pretrained_cfg', None) or {}
    wanted = cfg['input_size'][-1] if 'input_size' in cfg else side
    if stats is None: stats = [(0,)*3, (1,)*3]
    to = [cfg['mean'], cfg['std']] if 'mean' in cfg and 'std' in cfg else None
    if to and np.allclose(to, stats, atol=1e-4): to = None
    return net if wanted == side and to is None else Converted(net, wanted, stats, to).train(net.training)


def features(model:torch.nn.Module, x:torch.Tensor, mirror:bool=False) -> torch.Tensor:
    """Features h = phi(x) (B, D) of Eq. 2: those before the classifier of a timm model, or the output of any other module

    With `mirror` they are the mean of the features of the images (B, 3, H, W) and of their mirror images.
    """
    if mirror: return (features(model, x) + features(model, x.flip(-1)))/2
    if hasattr(model, 'forward_head'): return model.forward_head(model.forward_features(x), pre_logits=True)
    return model(x)

def feature_size(model:torch.nn.Module) -> int:
    "Size D of the `features` of a timm model; UserError for a module that does not name it"
    size = getattr(model, 'head_hidden_size', None) or getattr(model, 'num_features', None)
    if size is None: raise UserError(f'{type(model).__name__} does not say how many features it has: give it an attribute num_features')
    return size
