"""Equations 10-15 of GRDD (arXiv 2107.05583) as functions of tensors, and the loss of a batch of episodes

Shapes: E episodes, NS = way*shot support images, NQ query images, D features, C = way classes. Half precision is computed in float32,
also under autocast.
"""
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from .core.errors import UserError

__all__ = ['full_precision', 'relatedness', 'of_all_pairs', 'log_relatedness', 'kl_relatedness', 'class_relatedness', 'regularizer',
           'EpisodicLoss']


R = TypeVar('R')

def full_precision(f:Callable[..., R]) -> Callable[..., R]:
    "Decorator: run `f` without autocast, which would undo a `.float()`, and with half-precision tensors in float32; float64 is kept"
    def up(x): return x.float() if isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x
    @wraps(f)
    def _f(x, *args, **kwargs):
        with torch.autocast(x.device.type, enabled=False):
            return f(up(x), *map(up, args), **{k:up(v) for k,v in kwargs.items()})
    return _f


@full_precision
def relatedness(
    support:torch.Tensor, # features of the support images (E, NS, D)
    query:torch.Tensor, # features of the query images (E, NQ, D)
    center:bool=False, # whether the mean feature of each episode is subtracted first (not in the paper)
) -> torch.Tensor:
    "Eq. 10: R (E, NS, NQ), the cosine of every support feature with every query feature"
    if center:
        mean = torch.cat([support, query], 1).mean(1, keepdim=True)
        support,query = support - mean,query - mean
    return F.normalize(support, dim=-1) @ F.normalize(query, dim=-1).transpose(-1, -2)


def of_all_pairs(h:torch.Tensor, center:bool=False) -> torch.Tensor:
    """Relatedness (E, N, N-1) of each image of an episode with all others of it, from features h (E, N, D)

    Every image is a support image, and all others are its queries. This is not in the paper, whose Eq. 10 divides the images.
    """
    R = relatedness(h, h, center)
    E,N,_ = R.shape
    return R.flatten(1)[:, 1:].view(E, N - 1, N + 1)[..., :-1].reshape(E, N, N - 1) # without the diagonal


@full_precision
def log_relatedness(
    R:torch.Tensor, # relatedness (E, NS, NQ)
    T:float, # temperature; the cosines are divided by it
    decouple:bool=True, # True: one softmax per support image (Eq. 11); False: one softmax over the whole matrix (the paper's 'w/o RDD')
) -> torch.Tensor:
    """Eq. 11: log of the decoupled relatedness w (E, NS, NQ), a group per support image; without `decouple` (E, 1, NS*NQ), one group

    UserError unless T is positive and finite.
    """
    if not 0 < T < float('inf'): raise UserError(f'the temperature T is {T}: it must be positive, since it divides the cosines')
    return F.log_softmax((R if decouple else R.flatten(1).unsqueeze(1)) / T, dim=-1)


@full_precision
def kl_relatedness(
    R_e:torch.Tensor, # the student's relatedness (E, NS, NQ)
    R_g:torch.Tensor, # the teacher's relatedness (E, NS, NQ)
    T:float, # temperature
    decouple:bool=True, # True: a group per support image; False: the whole matrix is one group
    reverse:bool=False, # True: KL(student || teacher); False: KL(teacher || student)
    reduction:str='sum', # reduction over the groups of an episode: 'sum' (Eq. 12) or 'mean'
) -> torch.Tensor:
    "Eq. 12: KL divergence of the groups, summed within an episode and averaged over episodes (scalar)"
    if reduction not in ('mean', 'sum'): raise UserError(f"reduction is {reduction!r}: it is 'mean' or 'sum'")
    log_e = log_relatedness(R_e, T, decouple)
    log_g = log_relatedness(R_g, T, decouple)
    p,q = (log_e,log_g) if reverse else (log_g,log_e)
    kl = (p.exp() * (p - q)).sum(-1) # (E, groups)
    return (kl.mean(-1) if reduction == 'mean' else kl.sum(-1)).mean()


@full_precision
def class_relatedness(
    R:torch.Tensor, # relatedness (E, NS, NQ)
    support_y:torch.Tensor, # class of each support image, 0..C-1 (E, NS)
    n_way:int, # C, classes per episode
    mean:bool=False, # whether the sum is divided by the number of support images of the class
) -> torch.Tensor:
    "Eq. 14: sigma (E, NQ, C), the relatedness of each query image with each class: a sum over the support images of the class"
    onehot = F.one_hot(support_y, n_way).to(R.dtype) # (E, NS, C)
    sigma = R.transpose(-1, -2) @ onehot
    return sigma / onehot.sum(1, keepdim=True) if mean else sigma


@full_precision
def regularizer(
    sigma:torch.Tensor, # class relatedness (E, NQ, C)
    query_y:torch.Tensor, # class of each query image, 0..C-1 (E, NQ)
    scale:float=10., # factor that makes logits of sigma, which is a cosine or a sum of K cosines
) -> torch.Tensor:
    "Eq. 13: L_rt, cross-entropy of softmax(scale * sigma) with the classes of the query images (scalar)"
    return F.cross_entropy(scale * sigma.flatten(0, 1), query_y.flatten())


class EpisodicLoss(nn.Module):
    """gamma * L_rt (Eq. 13) of a batch of episodes from `EpisodicDL`; training with this loss alone is the paper's CL+EL

    After each call the attribute `L_rt` is the loss without its weight gamma. UserError for settings that are out of bounds.
    """
    def __init__(self, n_way:int=5, k_shot:int=1, n_query:int=15, scale:float=10., mean:bool=True, gamma:float=1.):
        super().__init__()
        if not isinstance(mean, bool): raise UserError(f'mean is {mean!r}: it is True or False')
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < float('inf'):
            raise UserError(f'the logit scale is {scale!r}: it must be positive')
        self.n_way,self.k_shot,self.n_query = n_way,k_shot,n_query
        self.scale,self.mean,self.gamma = scale,mean,gamma

    def episodes(self, h:torch.Tensor) -> torch.Tensor:
        "(E * n_way * (k_shot+n_query), D) -> (E, n_way * (k_shot+n_query), D): the rows of each episode"
        return h.unflatten(0, (-1, self.n_way*(self.k_shot + self.n_query)))

    def split(self, h:torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        "(E * n_way * (k_shot+n_query), D) -> support (E, n_way*k_shot, D) and query (E, n_way*n_query, D), both sorted by class"
        h = h.unflatten(0, (-1, self.n_way, self.k_shot + self.n_query))
        return h[:, :, :self.k_shot].flatten(1, 2),h[:, :, self.k_shot:].flatten(1, 2)

    def classes(self, h):
        "Class 0..C-1 of each row of the batch `h`"
        y = torch.arange(self.n_way, device=h.device).repeat_interleave(self.k_shot + self.n_query)
        return y.repeat(len(h) // len(y))

    def forward(self, h:torch.Tensor, y:torch.Tensor|None=None) -> torch.Tensor:
        # `y`, the base classes, is not needed: the order of the batch tells the classes
        support,query = self.split(h)
        support_y,query_y = self.split(self.classes(h))
        sigma = class_relatedness(relatedness(support, query), support_y, self.n_way, self.mean)
        loss = regularizer(sigma, query_y, self.scale)
        self.L_rt = loss.detach()
        return self.gamma * loss
