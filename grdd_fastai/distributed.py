"""Several processes on one training, a GPU each, as `accelerate launch` starts them: each trains on its part of every step."""
import atexit
import os
import shutil
import tempfile
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

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
    "Join the processes that `accelerate launch` started, if it did, and part at the end"
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
        except Exception as e: box[1] = e
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


class Distributed(Callback):
    """Train on this process's part of each step, with gradients averaged over all: in the place of fastai's DistributedTrainer

    A loader's batch is split evenly, an episode never. BatchNorm normalises over the process's own images unless `sync_bn`, which
    needs GPUs; its running statistics are rank 0's.
    """
    order = MixedPrecision.order + 1 # which hooks into the network itself
    def __init__(self, sync_bn=False): self.sync_bn = sync_bn
    def before_fit(self):
        rank,n = ranks()
        self.was = self.dls.loaders
        train = self.dls.train
        if not hasattr(train, 'shared'): raise UserError(f'{type(train).__name__} cannot be split among {n} processes: make the DataLoaders with category_dls or episodic_dls')
        self.learn.dls.loaders = [train.shared(rank, n), *self.was[1:]]
        if len(self.dls.train) < 1: raise UserError(f'not one step for {n} processes: give fewer processes, a smaller batch or more episodes')
        if self.sync_bn: self.learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.learn.model = DistributedDataParallel(self.model)
    def after_train(self):
        "Networks that are measured are the same"
        for b in self.model.module.buffers(): dist.broadcast(b, 0)
    def after_fit(self): self.learn.model,self.learn.dls.loaders = unwrapped(self.model),self.was
