"""Several processes on one training, a GPU each, as `accelerate launch` starts them: each trains on its part of every step."""
import atexit
import os
import shutil
import tempfile
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import UserError

__all__ = ['processes', 'Distributed']


def ranks():
    "(rank, n): which of how many processes this one is, (0, 1) alone"
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)

@contextmanager
def processes():
    "Join the processes that `accelerate launch` or torchrun started, if any, and leave the group at the end"
    check_launch(os.environ)
    if join := int(os.environ.get('WORLD_SIZE', 1)) > 1 and ranks()[1] == 1:
        try:
            from accelerate import PartialState
        except ImportError:
            raise UserError("several processes need accelerate: pip install 'grdd-fastai[distributed]'") from None
        PartialState()
    yield
    if join: # after an error the launcher ends them all
        dist.barrier(_words())
        dist.destroy_process_group()
        PartialState._reset_state()
        _words.cache_clear()


def check_launch(env):
    "UserError where a launcher was asked for several processes that know nothing of each other"
    if 'WORLD_SIZE' in env: return
    mpi = max(int(env.get(k, 1)) for k in ('OMPI_COMM_WORLD_SIZE', 'PMI_SIZE', 'MV2_COMM_WORLD_SIZE'))
    # accelerate launch --cpu starts one process, whatever it is asked for
    cpu = env.get('ACCELERATE_USE_CPU', '').lower() in ('1', 'true', 'yes') and 'MASTER_ADDR' in env
    if mpi > 1 or cpu:
        raise UserError(('mpirun started processes that train apart' if mpi > 1
                         else 'accelerate launch --cpu started one process where several were asked for') +
                        ': use torchrun --nproc_per_node 2 recipes/..., '
                        'or accelerate launch --multi_gpu --num_processes 2 recipes/..., on CPUs too')


# ---- words between processes, apart from what GPUs send each other ----------------------------------------------------

@lru_cache
def _words(): return dist.new_group(backend='gloo')

def shared(f):
    "What `f()` returns or raises in rank 0, in every process"
    rank,n = ranks()
    if n == 1: return f()
    box = [None, None] # result and error
    if rank == 0:
        try: box[0] = f()
        except BaseException as e: box[1] = e # a signal too: the others must not wait
    dist.broadcast_object_list(box, 0, group=_words())
    if box[1]: raise box[1]
    return box[0]

def agreed(code, key=None):
    "The largest of all processes' whole numbers `code` (by `key`)"
    if ranks()[1] == 1: return code
    codes = [None]*ranks()[1]
    dist.all_gather_object(codes, code, group=_words())
    return max(codes, key=key)

def gathered(items):
    "All processes' lists as one"
    if ranks()[1] == 1: return items
    lists = [None]*ranks()[1]
    dist.all_gather_object(lists, items, group=_words())
    return [o for items in lists for o in items]

def summed(tensor):
    "A tensor's sum over all processes, in its place"
    if ranks()[1] > 1: dist.all_reduce(tensor)
    return tensor

def replica(folder):
    "Rank 0 keeps `folder`; every other process gets a folder of its own with the same files, to write what it likes"
    folder = Path(folder)
    files = shared(lambda: {f.name:f.read_bytes() for f in folder.iterdir() if f.is_file()})
    if ranks()[0] == 0: return folder
    own = Path(tempfile.mkdtemp(prefix='grdd_fastai_'))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    own = own/folder.name
    own.mkdir()
    for name,content in files.items(): (own/name).write_bytes(content)
    return own


# ---- training ---------------------------------------------------------------------------------------------------------

def effective(k):
    "Images or episodes a step of all processes together where `k` are asked for: as many in each, at least one"
    n = ranks()[1]
    return max(1, k//n)*n

def unwrapped(model):
    "The network itself, which a distributed fit wraps"
    return model.module if isinstance(model, DistributedDataParallel) else model

def backbone_of(learn):
    "The network that a Learner of either stage trains, without stage one's heads and without what a distributed fit wraps around it"
    model = unwrapped(learn.model)
    return getattr(model, 'backbone', model)


class Summed(torch.autograd.Function):
    "A tensor's sum over all processes; each process's gradient is the sum of all as well"
    @staticmethod
    def forward(ctx, x): return summed(x.clone())
    @staticmethod
    def backward(ctx, grad): return summed(grad.clone(memory_format=torch.contiguous_format))

def shared_batch_norm(norm, x):
    """What the BatchNorm layer `norm` makes of x (B, C, ...) in training, with the mean and variance over all processes' images

    In float32 or float64, on any backend; the running statistics of all processes stay the same.
    """
    if not norm.training: return type(norm).forward(norm, x)
    dims,shape = [d for d in range(x.ndim) if d != 1],[1, -1] + [1]*(x.ndim - 2)
    z = x if x.dtype is torch.float64 else x.float()
    with torch.autocast(x.device.type, enabled=False):
        total = Summed.apply(torch.cat([z.sum(dims), z.new_tensor([z.numel() / z.shape[1]])]))
        n = total[-1].detach()
        mean = total[:-1] / n
        var = Summed.apply((z - mean.view(shape)).square().sum(dims)) / n
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


class Distributed(Callback):
    """Train on this process's part of each step, with gradients averaged over all: in the place of fastai's DistributedTrainer

    A loader's batch is split evenly, an episode never. BatchNorm normalises over all processes' images, so that the steps are those of one
    process; with `sync_bn=False` over the process's own, which saves two exchanges a layer.
    """
    order = MixedPrecision.order + 1 # which hooks into the network itself
    def __init__(self, sync_bn=True): self.sync_bn,self.norms = sync_bn,[]
    def before_fit(self):
        rank,n = ranks()
        self.was = self.dls.loaders
        train = self.dls.train
        if not hasattr(train, 'shared'):
            raise UserError(f'{type(train).__name__} cannot be split among {n} processes: '
                            'make the DataLoaders with category_dls or episodic_dls')
        self.learn.dls.loaders = [train.shared(rank, n), *self.was[1:]]
        if len(self.dls.train) < 1:
            raise UserError(f'not one step for {n} processes: give fewer processes, a smaller batch or more episodes')
        self.norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if self.sync_bn else []
        for m in self.norms: m.forward = partial(shared_batch_norm, m)
        self.learn.model = DistributedDataParallel(self.model, broadcast_buffers=not self.sync_bn)
    def after_train(self):
        "Networks that are measured are the same"
        for b in self.model.module.buffers(): dist.broadcast(b, 0)
    def after_fit(self):
        for m in self.norms: del m.forward
        self.norms,self.learn.model,self.learn.dls.loaders = [],unwrapped(self.model),self.was
