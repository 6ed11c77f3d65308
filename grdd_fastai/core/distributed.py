"""Several processes on one training, as `accelerate launch` or torchrun starts them: who is who, and what they tell each other."""
import atexit
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .errors import UserError

__all__ = ['processes']


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

def unwrapped(model):
    "The network itself, which a distributed fit wraps"
    return model.module if isinstance(model, DistributedDataParallel) else model

def backbone_of(learn):
    "The network that a Learner of either stage trains, without stage one's heads and without what a distributed fit wraps around it"
    model = unwrapped(learn.model)
    return getattr(model, 'backbone', model)

def say(text):
    if ranks()[0] == 0: print(text, file=sys.stderr, flush=True)
