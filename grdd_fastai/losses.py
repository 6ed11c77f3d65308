"""Equations 10-15 of GRDD (arXiv 2107.05583) as pure functions of tensors

Shapes: E episodes, NS = way*shot support images, NQ query images, D features, C = way classes. Everything is computed
in float32, also under autocast.
"""
from functools import wraps

import torch
import torch.nn.functional as F
from torch import nn

from .core.errors import UserError

__all__ = ['full_precision', 'relatedness', 'log_relatedness', 'kl_relatedness', 'class_relatedness', 'regularizer', 'EpisodicLoss']


def full_precision(f):
    "Run `f` with autocast off and its half-precision tensors in float32; a `.float()` alone is undone by autocast, and float64 stays"
    def up(x): return x.float() if isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x
    @wraps(f)
    def _f(x, *args, **kwargs):
        with torch.autocast(x.device.type, enabled=False):
            return f(up(x), *map(up, args), **{k:up(v) for k,v in kwargs.items()})
    return _f


@full_precision
def relatedness(
    support, # features (E, NS, D)
    query,   # features (E, NQ, D)
    center=False, # subtract each episode's mean feature first (not in the paper)
):
    "Eq. 10: cosines of every support with every query feature, R (E, NS, NQ)"
    if center:
        mean = torch.cat([support, query], 1).mean(1, keepdim=True)
        support,query = support - mean,query - mean
    return F.normalize(support, dim=-1) @ F.normalize(query, dim=-1).transpose(-1, -2)


@full_precision
def log_relatedness(
    R, # relatedness (E, NS, NQ)
    T=4., # temperature; it divides the cosines
    decouple=True, # one softmax per support image (Eq. 11), else one over the whole matrix ('w/o RDD')
):
    "Eq. 11: log of the decoupled relatedness w, groups (E, NS, NQ), or of the whole matrix (E, 1, NS*NQ)"
    if not 0 < T < float('inf'): raise UserError(f'the temperature T is {T}: it must be positive, since it divides the cosines')
    return F.log_softmax((R if decouple else R.flatten(1).unsqueeze(1)) / T, dim=-1)


@full_precision
def kl_relatedness(
    R_e, # the student's relatedness (E, NS, NQ)
    R_g, # the teacher's relatedness (E, NS, NQ)
    T=4., # temperature
    decouple=True, # groups per support image, else the whole matrix as one group
    reverse=False, # KL(student || teacher) instead of KL(teacher || student)
    reduction='sum', # over the groups of an episode: 'sum' (Eq. 12) or 'mean'
):
    "Eq. 12: the groups' KL divergences, summed within an episode and averaged over episodes (scalar)"
    log_e,log_g = log_relatedness(R_e, T, decouple),log_relatedness(R_g, T, decouple)
    p,q = (log_e,log_g) if reverse else (log_g,log_e)
    kl = (p.exp() * (p - q)).sum(-1)                                                      # (E, groups)
    return (kl.mean(-1) if reduction == 'mean' else kl.sum(-1)).mean()


@full_precision
def class_relatedness(
    R, # relatedness (E, NS, NQ)
    support_y, # class of each support image, 0..C-1 (E, NS)
    n_way, # C
    mean=False, # divide by the shots of the class
):
    "Eq. 14: sigma, the relatedness of each query with each class (E, NQ, C)"
    onehot = F.one_hot(support_y, n_way).to(R.dtype)                                      # (E, NS, C)
    sigma = R.transpose(-1, -2) @ onehot
    return sigma / onehot.sum(1, keepdim=True) if mean else sigma


@full_precision
def regularizer(
    sigma, # class relatedness (E, NQ, C)
    query_y, # class of each query image, 0..C-1 (E, NQ)
    scale=10., # logit scale: sigma is a cosine (or a sum of K of them), not a logit
):
    "Eq. 13: L_rt, cross-entropy of softmax(scale * sigma) with the queries' classes (scalar)"
    return F.cross_entropy(scale * sigma.flatten(0, 1), query_y.flatten())


class EpisodicLoss(nn.Module):
    "L_rt of a batch of episodes laid out as `EpisodicDL` does: training on it alone is the paper's CL+EL"
    def __init__(self, n_way=5, k_shot=1, n_query=15, scale=10., mean=True):
        super().__init__()
        if not isinstance(mean, bool): raise UserError(f'mean is {mean!r}: it is True or False')
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < float('inf'):
            raise UserError(f'the logit scale is {scale!r}: it must be positive')
        self.n_way,self.k_shot,self.n_query,self.scale,self.mean = n_way,k_shot,n_query,scale,mean

    def split(self, h):
        "(E * n_way * (k_shot+n_query), D) -> support (E, n_way*k_shot, D), query (E, n_way*n_query, D), class-major"
        h = h.unflatten(0, (-1, self.n_way, self.k_shot + self.n_query))
        return h[:, :, :self.k_shot].flatten(1, 2),h[:, :, self.k_shot:].flatten(1, 2)

    def classes(self, h):
        "Class 0..C-1 of each image, laid out as `h` is"
        y = torch.arange(self.n_way, device=h.device).repeat_interleave(self.k_shot + self.n_query)
        return y.repeat(len(h) // len(y))

    def forward(self, h, y=None): # `y`, the base classes, is known from the layout already
        (support,query),(support_y,query_y) = self.split(h),self.split(self.classes(h))
        sigma = class_relatedness(relatedness(support, query), support_y, self.n_way, self.mean)
        return regularizer(sigma, query_y, self.scale)
