"""Training on several processes: gradients and BatchNorm over the images of all of them."""
from functools import partial

import torch
import torch.distributed as dist
from fastai.callback.fp16 import MixedPrecision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..core.distributed import all_sum, rank_world, unwrapped
from ..core.errors import UserError
from .callbacks import UndoAfterFit
from .ema import measured_network

__all__ = ['Distributed']


def effective_step(k):
    "Images or episodes per step of all processes together if `k` are asked for: each process has the same number, at least one"
    n = rank_world()[1]
    return max(1, k//n)*n


class AllSum(torch.autograd.Function):
    "The sum of a tensor over all processes; the gradient is summed over all processes as well"
    @staticmethod
    def forward(ctx, x): return all_sum(x.clone())
    @staticmethod
    def backward(ctx, grad): return all_sum(grad.clone(memory_format=torch.contiguous_format))

def shared_batch_norm(norm, x):
    """Output of the BatchNorm layer `norm` for x (B, C, ...), in training with the mean and variance over the images of all processes

    The statistics are in float32, or in float64 if x is. The backend may be any. The running statistics stay the same in all processes.
    """
    if not norm.training: return type(norm).forward(norm, x)
    dims = [d for d in range(x.ndim) if d != 1]
    shape = [1, -1] + [1]*(x.ndim - 2)
    z = x if x.dtype is torch.float64 else x.float()
    with torch.autocast(x.device.type, enabled=False):
        total = AllSum.apply(torch.cat([z.sum(dims), z.new_tensor([z.numel() / z.shape[1]])]))
        n = total[-1].detach()
        mean = total[:-1] / n
        var = AllSum.apply((z - mean.view(shape)).square().sum(dims)) / n
        y = (z - mean.view(shape)) * (var + norm.eps).rsqrt().view(shape)
        if norm.affine: y = y * norm.weight.view(shape) + norm.bias.view(shape)
    if norm.track_running_stats:
        with torch.no_grad():
            norm.num_batches_tracked += 1
            share = 1/norm.num_batches_tracked if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
            norm.running_var.lerp_((var * n/(n - 1)).to(norm.running_var.dtype), share)
    y = y.to(x.dtype)
    return norm.act(norm.drop(y)) if hasattr(norm, 'act') and hasattr(norm, 'drop') else y # timm's BatchNormAct2d


class Distributed(UndoAfterFit):
    """Train on this process's part of each step, with gradients averaged over all processes; it replaces fastai's DistributedTrainer

    A loader's batch is split evenly; an episode is never split. BatchNorm normalises over the images of all processes, so that the steps
    are those of one process. With `sync_bn=False` it normalises over the images of this process, which saves two exchanges per layer.
    UserError for a loader that cannot be split or has no step for this many processes.
    """
    order = MixedPrecision.order + 1 # after MixedPrecision, whose hooks belong on the network itself
    def __init__(self, sync_bn=True):
        self.sync_bn = sync_bn
        self.norms = []
    def before_fit(self):
        rank,n = rank_world()
        self.was = self.dls.loaders
        train = self.dls.train
        if not hasattr(train, 'for_rank'):
            raise UserError(f'{type(train).__name__} cannot be split among {n} processes: '
                            'make the DataLoaders with category_dls or episodic_dls')
        self.learn.dls.loaders = [train.for_rank(rank, n), *self.was[1:]]
        if len(self.dls.train) < 1:
            raise UserError(f'not one step for {n} processes: give fewer processes, a smaller batch or more episodes')
        self.norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if self.sync_bn else []
        for m in self.norms: m.forward = partial(shared_batch_norm, m)
        self.learn.model = DistributedDataParallel(self.model, broadcast_buffers=False) # training does not read them
    def after_train(self):
        "Give every process the first one's running statistics, so that all validate the same network"
        for net in dict.fromkeys([self.model.module, measured_network(self.learn)]): # one network, or two with a moving average
            for b in net.buffers(): dist.broadcast(b, 0)
    def after_fit(self):
        for m in self.norms: del m.forward
        self.learn.dls.loaders = self.was
        self.learn.model = unwrapped(self.model)
        self.norms = []
