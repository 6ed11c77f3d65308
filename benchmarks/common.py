"""What the benchmarks share: made-up data of any size, clocks, processes, and lines that are printed and kept"""
import json
import multiprocessing
import statistics
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pandas as pd
import torch

from grdd_fastai.core.errors import first_line
from grdd_fastai.core.storage import write_json
from grdd_fastai.data.cache import Split
from grdd_fastai.runs.provenance import command, device_name, git_commit, now, versions

LINES = []

def print_line(**line):
    "Print a line as JSON, and keep it for `write`"
    LINES.append(line)
    print(json.dumps(line), flush=True)

def write(out, *packages):
    "Write all lines with device, versions (also those of `packages`), commit and command to the JSON file `out`, if it is given"
    if not out: return
    found = {}
    for package in packages:
        try: found[package] = version(package)
        except PackageNotFoundError: continue
    write_json(out, dict(lines=LINES, device=device_name(), cores=torch.get_num_threads(), commit=git_commit(), time=now(),
                         versions=versions() | found, command=command()))

def wait(device):
    "Wait until `device` has finished its work, and return the time in seconds"
    if device.type == 'cuda': torch.cuda.synchronize(device)
    elif device.type == 'mps': torch.mps.synchronize()
    return time.perf_counter()

def seconds(f, *args, **kwargs):
    "Seconds that `f(*args, **kwargs)` takes"
    start = time.perf_counter()
    f(*args, **kwargs)
    return time.perf_counter() - start

def medians(repeats, *fs):
    "Median seconds of each of the functions `fs`, which take turns"
    times = [[seconds(f) for f in fs] for _ in range(repeats)]
    return list(map(statistics.median, zip(*times)))

def attempt(f, *args):
    "What `f(*args)` returns, the entries of a line; if it fails, the entry `error`"
    try: return f(*args)
    except Exception as e:
        traceback.print_exc()
        return dict(error=f'{type(e).__name__}: {first_line(e)}')

def in_own_process(f, *args):
    "`attempt` in a new process, where a GPU has no memory in use, no compiled kernels and no earlier error"
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        try: return pool.submit(attempt, f, *args).result()
        except BrokenProcessPool as e: return dict(error=f'{type(e).__name__}: {first_line(e)}')


def easyfsl_loader(data, way, shot, query, n):
    "easyfsl's DataLoader of `n` episodes of one of its data sets, as its tutorials make it"
    from easyfsl.samplers import TaskSampler
    from torch.utils.data import DataLoader, Sampler
    Sampler.__init__ = lambda self, data_source=None: None # easyfsl 1.5.0 passes an argument that torch no longer takes
    sampler = TaskSampler(data, way, shot, query, n)
    return DataLoader(data, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn)


class MadeUp:
    "Packed splits of random pixels with the attributes that training needs of a `FewShotData`"
    name = fingerprint = image_fingerprint = 'made up'
    resize = 'fit bicubic'
    stats = [[.5, .5, .5], [.25, .25, .25]]
    def __init__(self, px, n_images, n_classes=64, n_other=640):
        self.px = px
        rng = np.random.default_rng(0)
        for split,n,c in (('train', n_images, n_classes), ('val', n_other, 16), ('test', n_other, 20)):
            labels = pd.DataFrame(dict(filename=[str(i) for i in range(n)], label=[f'{split}{i*c//n:05d}' for i in range(n)]))
            setattr(self, split, Split(split, rng.integers(0, 256, (n, px, px, 3), dtype=np.uint8), labels))
    def __repr__(self): return f'made-up images of {self.px} px'
