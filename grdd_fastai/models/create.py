"""Any timm model by name, the features it gives and the images it takes."""
import difflib
import math

import timm
import torch

from ..core.errors import UserError, first_line
from ..core.storage import LARGEST_SIDE

__all__ = ['check_backbone', 'external_weights', 'create_backbone', 'check_images', 'images_of', 'features']


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

def check_images(px, mean, std, crop_pct=1., interpolation='bicubic'):
    "Side and normalisation of a network's images as `pretrained_cfg` holds them; ValueError if they are impossible"
    def numbers(v): return isinstance(v, list | tuple) and len(v) == 3 and all(isinstance(n, int | float) and math.isfinite(n) for n in v)
    if type(px) is not int or not 1 <= px <= LARGEST_SIDE: raise ValueError(f'images of {px!r} px: from 1 to {LARGEST_SIDE} can be')
    if not numbers(mean) or not numbers(std) or min(std) <= 0:
        raise ValueError(f'mean {mean!r}, std {std!r}: three numbers each, those of std positive')
    if not isinstance(crop_pct, int | float) or not 0 < crop_pct <= 1: raise ValueError(f'crop_pct {crop_pct!r}: above 0, at most 1')
    if interpolation not in ('bicubic', 'bilinear', 'nearest', 'lanczos', 'random'):
        raise ValueError(f'interpolation {interpolation!r} is none')
    return dict(input_size=(3, px, px), mean=tuple(mean), std=tuple(std), crop_pct=crop_pct, interpolation=interpolation)

def images_of(net):
    "Side, mean and std of the images that a timm network takes, as its `pretrained_cfg` has them"
    cfg = getattr(net, 'pretrained_cfg', None)
    if not cfg or not {'input_size', 'mean', 'std'} <= cfg.keys(): raise UserError(
        f'a {type(net).__name__} does not say what images it takes (pretrained_cfg): '
        'give a timm model, or set input_size, mean and std there')
    return cfg['input_size'][1],list(cfg['mean']),list(cfg['std'])


def features(model, x):
    "h = phi(x) (Eq. 2), (B, D): a timm model's features before its classifier, any other module's output"
    if hasattr(model, 'forward_head'): return model.forward_head(model.forward_features(x), pre_logits=True)
    return model(x)
