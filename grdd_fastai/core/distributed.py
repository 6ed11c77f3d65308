"""Distributed training as `accelerate launch` or torchrun starts it: ranks, and messages between the processes."""
import atexit
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .errors import UserError

__all__ = ['processes']


def rank_world():
    "(rank, n): this process's rank and the number of processes; (0, 1) without a process group"
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)

@contextmanager
def processes():
    "Join the group of processes that `accelerate launch` or torchrun started, if any, and leave it at the end"
    check_launch(os.environ)
    join = int(os.environ.get('WORLD_SIZE', 1)) > 1 and rank_world()[1] == 1
    if join:
        try:
            from accelerate import PartialState
        except ImportError:
            raise UserError("several processes need accelerate: pip install 'grdd-fastai[distributed]'") from None
        PartialState()
    yield
    if join: # after an error this is not reached, and the launcher ends all processes
        dist.barrier(_words())
        dist.destroy_process_group()
        PartialState._reset_state()
        _words.cache_clear()


def check_launch(env):
    "Raise UserError if the launcher that set the environment variables `env` started processes that do not train together"
    if 'WORLD_SIZE' in env: return
    mpi = max(int(env.get(k, 1)) for k in ('OMPI_COMM_WORLD_SIZE', 'PMI_SIZE', 'MV2_COMM_WORLD_SIZE'))
    # accelerate launch --cpu starts one process, whatever number it is asked for
    cpu = env.get('ACCELERATE_USE_CPU', '').lower() in ('1', 'true', 'yes') and 'MASTER_ADDR' in env
    if mpi > 1: what = 'mpirun started processes that train apart'
    elif cpu: what = 'accelerate launch --cpu started one process where several were asked for'
    else: return
    raise UserError(f'{what}: use torchrun --nproc_per_node 2 recipes/..., '
                    'or accelerate launch --multi_gpu --num_processes 2 recipes/..., on CPUs too')


# ---- messages between processes ---------------------------------------------------------------------------------------

@lru_cache
def _words():
    "The process group of the messages, which the CPUs send even where GPUs exchange the tensors"
    return dist.new_group(backend='gloo')

def from_rank_zero(f):
    "Call `f` in rank 0 alone, and return its result or raise its error in every process"
    rank,n = rank_world()
    if n == 1: return f()
    box = [None, None] # the result and the error
    if rank == 0:
        try: box[0] = f()
        except BaseException as e: box[1] = e # signals are passed on too, so that no other process waits
    dist.broadcast_object_list(box, 0, group=_words())
    if box[1]: raise box[1]
    return box[0]

class LateMax:
    "The largest of whole numbers, 0 or more, that all processes give: `start` does not wait for the others, `result` does"
    def __init__(self): self.work = None
    def start(self, number):
        self.numbers = torch.tensor([number])
        self.work = dist.all_reduce(self.numbers, dist.ReduceOp.MAX, group=_words(), async_op=True)
    def result(self):
        "The largest of the numbers that were started last; 0 if there are none"
        if self.work is None: return 0
        self.work.wait()
        self.work = None
        return int(self.numbers)

def all_gather(items):
    "The lists of all processes, joined in the order of ranks"
    if rank_world()[1] == 1: return items
    lists = [None]*rank_world()[1]
    dist.all_gather_object(lists, items, group=_words())
    return [o for items in lists for o in items]

def all_sum(tensor):
    "Replace a tensor by its sum over all processes, and return it"
    if rank_world()[1] > 1: dist.all_reduce(tensor)
    return tensor

def scratch_copy(folder):
    "Return `folder` in rank 0, and a private temporary copy of it in every other process, where that process can write freely"
    folder = Path(folder)
    files = from_rank_zero(lambda: {f.name:f.read_bytes() for f in folder.iterdir() if f.is_file()})
    if rank_world()[0] == 0: return folder
    own = Path(tempfile.mkdtemp(prefix='grdd_fastai_'))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    own = own/folder.name
    own.mkdir()
    for name,content in files.items(): (own/name).write_bytes(content)
    return own

def unwrapped(model):
    "The network itself, without the wrapper of a distributed fit"
    return model.module if isinstance(model, DistributedDataParallel) else model

def backbone_of(learn):
    "The backbone that a Learner of either stage trains, without the heads of stage one and the wrapper of a distributed fit"
    return without_heads(unwrapped(learn.model))

def without_heads(model):
    "The backbone of a network in training; a network without heads is its own backbone"
    return getattr(model, 'backbone', model)

def log(text):
    "Print `text` on stderr, once for all processes"
    if rank_world()[0] == 0: print(text, file=sys.stderr, flush=True)
