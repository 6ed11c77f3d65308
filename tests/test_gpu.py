"""On an NVIDIA GPU: no step waits for it, runs repeat and resume to the bit, several processes train over NCCL."""
import json

import pytest
import torch
from fastai.callback.core import Callback
from helpers import ROOT, launch, leavings, net, recipe, settings, stage_one_learner, stage_two_learner

from grdd_fastai.core.device import seed_generators
from grdd_fastai.data.augment import train_augmentation
from grdd_fastai.runs.checkpoint import Checkpoint, Deadline, SkipBatches, StopOnNaN
from grdd_fastai.training.optim import muon

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


class NoWaiting(Callback):
    "From the third step on, any operation for which the host waits for the GPU raises an error; before the epoch ends it may again"
    order = 1000
    run_valid = False
    def __init__(self): self.steps = 0
    def before_batch(self): torch.cuda.set_sync_debug_mode('error' if 2 <= self.iter < self.n_iter - 1 else 'default')
    def after_batch(self):
        self.steps += torch.cuda.get_sync_debug_mode() > 0
        if self.iter >= self.n_iter - 2: torch.cuda.set_sync_debug_mode('default')

@pytest.mark.parametrize('stage', ['one', 'muon', 'two', 'labels alone'])
def test_ten_steps_never_wait_for_the_gpu(data, tmp_path, stage):
    aug = train_augmentation(16)
    if stage in ('one', 'muon'): learn = stage_one_learner(data, aug, bs=8, **(dict(opt_func=muon) if stage == 'muon' else {}))
    else: learn = stage_two_learner(data, net(5) if stage == 'two' else None, n_episodes=15, aug=aug)
    watch = NoWaiting()
    learn.add_cbs([SkipBatches(), StopOnNaN('net'), Checkpoint(tmp_path/'checkpoint', dict, Deadline()), watch])
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert watch.steps >= 10

def test_deterministic_runs_repeat_and_resume_to_the_bit(csv_set, cache, tmp_path):
    "One is stopped in the middle of each of its first epochs"
    how = dict(deterministic=True, **settings(csv_set, cache))
    for name in ('a', 'b'): recipe('cifarfs_5w1s')(out=str(tmp_path/name), **how)
    for _ in range(3): recipe('cifarfs_5w1s')(out=str(tmp_path/'c'), resume=True, max_minutes=1e-9, **how)
    assert json.loads((tmp_path/'c'/'result.json').read_text())['status'] == 'stopped'
    recipe('cifarfs_5w1s')(out=str(tmp_path/'c'), resume=True, **how)
    assert leavings(tmp_path/'a') == leavings(tmp_path/'b') == leavings(tmp_path/'c')

def test_generators_are_seeded_as_by_torch():
    seed_generators('cuda', 7)
    ours = torch.rand(3, device='cuda'),torch.rand(3)
    torch.manual_seed(7)
    assert all(torch.equal(torch.rand(3, device=x.device), x) for x in ours)

@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_two_processes_over_nccl_end_with_one_result(faint, cache, tmp_path):
    flags = [str(o) for k,v in settings(faint, cache).items() for o in (f'--{k.replace("_", "-")}', v)]
    done = launch(ROOT/'recipes'/'cifarfs_5w1s.py', *flags, '--out', tmp_path/'run')
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1])['status'] == 'finished'
