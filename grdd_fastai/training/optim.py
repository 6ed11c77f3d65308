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
        if X.ndim == 3: X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a) # the formula below in two kernels
        else: X = a*X + (b*A + c*A@A) @ X
    return (X.mT if tall else X).to(G.dtype)


def alike(ps):
    """Lists of those parameters whose matrices are computed together

    On a GPU they are those of one shape, because launching a kernel takes as long as a small product. On a CPU each matrix is
    alone, because stacks of large matrices are slower there.
    """
    if all(p.device.type == 'cpu' for p in ps): return [[p] for p in ps]
    return [[p for p in ps if p.shape == shape] for shape in dict.fromkeys(p.shape for p in ps)]


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
            params = [p for p in group['params'] if p.grad is not None]
            self.step_matrices([p for p in params if p.ndim > 1], **group)
            self.step_vectors([p for p in params if p.ndim < 2], **group)
        return loss

    def step_matrices(self, ps, lr, weight_decay, momentum, **_):
        for same in alike(ps):
            for p in same:
                if not self.state[p]: self.state[p]['grad_avg'] = torch.zeros_like(p)
            avgs = [self.state[p]['grad_avg'] for p in same]
            torch._foreach_lerp_(avgs, [p.grad for p in same], 1 - momentum)
            Gs = [G.flatten(1) for G in avgs]
            steps = [orthogonalized(Gs[0])] if Gs[0].device.type == 'cpu' and len(Gs) == 1 else orthogonalized(torch.stack(Gs))
            torch._foreach_mul_(same, 1 - lr*weight_decay)
            torch._foreach_sub_(same, [step.view(p.shape) for step,p in zip(steps, same)], alpha=lr * 0.2*max(Gs[0].shape)**0.5)

    def step_vectors(self, ps, lr, beta2, eps, beta1=0.9, **_):
        if not ps: return
        for p in ps:
            if not self.state[p]: self.state[p].update(grad_avg=torch.zeros_like(p), sqr_avg=torch.zeros_like(p), step=torch.zeros(()))
        means,sqrs,counts = ([self.state[p][k] for p in ps] for k in ('grad_avg', 'sqr_avg', 'step'))
        grads = [p.grad for p in ps]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_lerp_(sqrs, torch._foreach_mul(grads, grads), 1 - beta2)
        t = [count.add_(1).item() for count in counts] # the counts lie on the CPU
        sizes = torch._foreach_div(sqrs, [1 - beta2**n for n in t])
        torch._foreach_sqrt_(sizes)
        torch._foreach_add_(sizes, eps)
        steps = torch._foreach_div(means, [1 - beta1**n for n in t])
        torch._foreach_div_(steps, sizes)
        torch._foreach_sub_(ps, steps, alpha=lr)


FUSED = ('cpu', 'cuda', 'mps') # devices with a fused SGD

def fused_sgd(params, **kwargs):
    "torch's SGD, which updates all parameters in one kernel if the device has one"
    params = list(params) # parameters, or groups of them
    first = params[0]['params'][0] if isinstance(params[0], dict) else params[0]
    return torch.optim.SGD(params, fused=first.device.type in FUSED, **kwargs)

class TorchOptimizer(OptimWrapper):
    "fastai's wrapper of an optimiser of torch, without the hyperparameters that are None, which fastai's TensorBoardCallback cannot write"
    @property
    def hypers(self): return [{k:v for k,v in group.items() if v is not None} for group in super().hypers]

sgd = partial(TorchOptimizer, opt=fused_sgd, momentum=0.9)
muon = partial(TorchOptimizer, opt=Muon)
OPTIMISERS = dict(sgd=sgd, muon=muon)
