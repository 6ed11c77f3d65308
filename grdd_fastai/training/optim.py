"""Optimisers of both stages: SGD as in the paper (arXiv 2107.05583), and Muon."""
from functools import partial

import torch
from fastai.optimizer import OptimWrapper

from ..core.device import autocast_dtype

__all__ = ['orthogonalized', 'Muon', 'sgd', 'muon', 'OPTIMISERS']


# (a, b, c) of each Newton-Schulz step
COEFFICIENTS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
                (2.8366, -3.0525, 1.2012))


def orthogonalized(G):
    """Approximate the orthogonal factor U V^T of matrices G = U S V^T (..., M, N) by five Newton-Schulz steps

    The computation is in bfloat16 if the device supports it, else in float32. Singular values far below the largest one stay below 1. The
    coefficients are timm's default.
    """
    X = G.to(torch.bfloat16 if autocast_dtype(G.device) is torch.bfloat16 else torch.float32)
    if tall := G.shape[-2] > G.shape[-1]: X = X.mT
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for a,b,c in COEFFICIENTS:
        A = X @ X.mT
        X = a*X + (b*A + c*A@A) @ X
    return (X.mT if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Keller Jordan's Muon: orthogonalised momentum for each weight matrix or kernel (out, in*kh*kw), Adam for biases, norms and scalars

    The factor 0.2 sqrt(max(out, in)) makes the step of a matrix as large as Adam's (arXiv 2502.16982). Weight decay is decoupled and for
    matrices only. It is `timm.optim.Muon`, but in float32 on a processor without bfloat16, where timm's takes longer than the network.
    """
    def __init__(self, params, lr=0.02, weight_decay=0., momentum=0.95, beta2=0.95, eps=1e-8):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2, eps=eps))

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad(): loss = closure() if closure else None
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is None: continue
                step = self.step_matrix if p.ndim > 1 else self.step_vector
                step(p, self.state[p], **group)
        return loss

    def step_matrix(self, p, state, lr, weight_decay, momentum, **_):
        if not state: state['grad_avg'] = torch.zeros_like(p)
        G = state['grad_avg'].lerp_(p.grad, 1 - momentum).flatten(1)
        p.mul_(1 - lr*weight_decay).sub_(orthogonalized(G).view(p.shape), alpha=lr * 0.2*max(G.shape)**0.5)

    def step_vector(self, p, state, lr, beta2, eps, beta1=0.9, **_):
        if not state: state.update(grad_avg=torch.zeros_like(p), sqr_avg=torch.zeros_like(p), step=torch.zeros(()))
        t = state['step'].add_(1).item()
        mean = state['grad_avg'].lerp_(p.grad, 1 - beta1) / (1 - beta1**t)
        sqr = state['sqr_avg'].lerp_(p.grad.square(), 1 - beta2) / (1 - beta2**t)
        p.sub_(mean / (sqr.sqrt() + eps), alpha=lr)


FUSED = ('cpu', 'cuda', 'mps') # devices with a fused SGD

def fused_sgd(params, **kwargs):
    "torch's SGD, which updates all parameters in one kernel if the device has one"
    params = list(params) # parameters, or groups of them
    first = params[0]['params'][0] if isinstance(params[0], dict) else params[0]
    return torch.optim.SGD(params, fused=first.device.type in FUSED, **kwargs)

sgd = partial(OptimWrapper, opt=fused_sgd, momentum=0.9)
muon = partial(OptimWrapper, opt=Muon)
OPTIMISERS = dict(sgd=sgd, muon=muon)
