"""Runs that are stopped, killed and continued: the same weights to the bit; damaged and forged checkpoints: a sentence."""
import json
import multiprocessing
import os
import random
import re
import signal
import time

import pytest
import torch
from helpers import child, leavings, posix, recipe, says, settings, stopped

from grdd_fastai.core.errors import UserError
from grdd_fastai.core.storage import load_tensors, save_tensors
from grdd_fastai.runs import checkpoint


def test_stopping_after_every_single_step_changes_nothing(csv_set, cache, tmp_path, undisturbed, capsys):
    "A time budget that one step uses up: as many sessions as steps, through all three stages"
    out,sessions = tmp_path/'run',0
    while True:
        r = recipe('cifarfs_5w1s')(out=str(out), resume=True, max_minutes=1e-9, **settings(csv_set, cache))
        sessions += 1
        if r['status'] == 'finished': break
        assert (r['status'] == 'stopped' and re.search(r'^student_\w+ from epoch \d, step \d on, of 2 epochs|^teacher from', r['left'])
                and sessions < 50)
        said = capsys.readouterr()
        assert (json.loads(said.out.strip().splitlines()[-1])['status'] == 'stopped'
                and 'stopped (the time is used up): left to do are' in said.err)
        if not os.path.exists(out/'student_cl.json'):
            with pytest.raises(UserError, match='holds an unfinished run'): recipe('cifarfs_5w1s')(out=str(out), **settings(csv_set, cache))
    assert sessions > 12 and leavings(out) == undisturbed and not list(out.glob('checkpoint*'))
    again = recipe('cifarfs_5w1s')(out=str(out), resume=True, **settings(csv_set, cache))
    assert again == r == json.loads((out/'result.json').read_text())

@pytest.mark.slow
@pytest.mark.skipif(os.name != 'posix', reason='SIGKILL is POSIX')
def test_kill_dash_nine_at_any_moment_loses_nothing(csv_set, cache, tmp_path, undisturbed):
    "At least 24 kills, at random times and inside writes, over as many runs as they take; the lock of the dead is no obstacle"
    rng,ctx,kills,runs = random.Random(0),multiprocessing.get_context('forkserver'),[],0
    ctx.set_forkserver_preload(['grdd_fastai.all', 'helpers'])
    while len(kills) < 24:
        out,runs = tmp_path/f'run{runs}',runs + 1
        for tries in range(60):
            inside = (rng.randint(2, 8), rng.randrange(3)) if tries % 2 else None
            p = ctx.Process(target=child, args=(str(out), settings(csv_set, cache), torch.get_num_threads(), inside))
            p.start()
            if inside is None: # any time from before the folder is made to the evaluation
                deadline = time.time() + rng.uniform(.1, 2.)
                while p.is_alive() and time.time() < deadline: time.sleep(.005)
                if p.is_alive(): os.kill(p.pid, signal.SIGKILL)
            p.join(300)
            assert p.exitcode in (0, -signal.SIGKILL), open(f'{out}.log').read()[-3000:]
            if p.exitcode == 0: break
            kills.append('inside a write' if inside else 'at a random time')
        assert leavings(out) == undisturbed and not list(out.glob('checkpoint*'))
    print(f'{len(kills)} kills, {kills.count("inside a write")} of them inside a write, over {runs} runs: 0 losses, 0 differences')
    assert min(kills.count(k) for k in set(kills)) >= 5 and len(set(kills)) == 2

@posix
@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits_with_its_code(csv_set, cache, tmp_path, undisturbed, monkeypatch, number, code):
    out,hits = tmp_path/'run',[]
    class Signal(checkpoint.SkipBatches):
        name = 'skip_batches'
        def after_loss(self):
            if not hits:
                hits.append(1)
                os.kill(os.getpid(), number)
    monkeypatch.setattr('grdd_fastai.runs.run.SkipBatches', Signal)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as e: recipe('cifarfs_5w1s')(out=str(out), **settings(csv_set, cache))
    assert e.value.code == code and signal.getsignal(number) is before and (out/'checkpoint_student_cl.safetensors').exists()
    assert json.loads((out/'result.json').read_text())['status'] == 'stopped'
    recipe('cifarfs_5w1s')(out=str(out), resume=True, **settings(csv_set, cache))
    assert leavings(out) == undisturbed

def test_a_full_disk_in_a_run_keeps_the_last_checkpoint(csv_set, cache, tmp_path, undisturbed, monkeypatch):
    out,real,calls = tmp_path/'run',os.fsync,[]
    def full(fd):
        calls.append(fd)
        if len(calls) == 9: raise OSError(28, 'No space left on device')
        real(fd)
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='No space left on device'): recipe('cifarfs_5w1s')(out=str(out), **settings(csv_set, cache))
    recipe('cifarfs_5w1s')(out=str(out), resume=True, **settings(csv_set, cache))
    assert leavings(out) == undisturbed

def test_a_loss_that_is_not_finite_stops_with_epoch_and_step(csv_set, cache, tmp_path):
    with pytest.raises(UserError, match=r'student_cl, epoch \d+, step \d+: .*lower the learning rate'):
        recipe('cifarfs_5w1s')(out=str(tmp_path/'run'), **settings(csv_set, cache, lr=1e30, epochs=3))


# ---- damaged and forged checkpoints -----------------------------------------------------------------------------------

def test_a_damaged_checkpoint_gives_way_to_the_one_before(csv_set, cache, tmp_path, undisturbed, capsys):
    out = stopped(csv_set, cache, tmp_path/'run', 3)
    ckpt = out/'checkpoint_student_cl.safetensors'
    damaged = bytearray(ckpt.read_bytes())
    damaged[-5] ^= 1
    ckpt.write_bytes(damaged)
    recipe('cifarfs_5w1s')(out=str(out), resume=True, **settings(csv_set, cache))
    assert 'the checkpoint before it is used' in capsys.readouterr().err and leavings(out) == undisturbed

def test_no_whole_checkpoint_is_one_sentence(csv_set, cache, tmp_path):
    out = stopped(csv_set, cache, tmp_path/'run', 2)
    for f in out.glob('checkpoint*'): f.write_bytes(f.read_bytes()[:-9])
    with pytest.raises(UserError, match='no checkpoint in .* is whole'):
        recipe('cifarfs_5w1s')(out=str(out), resume=True, **settings(csv_set, cache))

@pytest.mark.parametrize('change, word', [(dict(epoch=10**9), 'epoch 1000000000'), (dict(epoch=-1), 'epoch -1'),
                                          (dict(step=10**9), 'step 1000000000'), (dict(epoch='x'), 'epoch x'),
                                          (dict(format=2), 'has format 2'),
                                          (dict(stage='teacher'), 'not a checkpoint of this training'), (dict(values=[]), None),
                                          (dict(values=[[1.]]*7), 'not a checkpoint'),
                                          (dict(parts={}), 'not a checkpoint'), (dict(opt=5), 'not a checkpoint'),
                                          (dict(groups=[]), 'not a checkpoint'), (dict(best='x'), 'not a checkpoint')])
def test_forged_checkpoints(csv_set, cache, tmp_path, change, word):
    out = stopped(csv_set, cache, tmp_path/'run')
    path = out/'checkpoint_student_cl.safetensors'
    tensors,meta = load_tensors(path)
    save_tensors(path, tensors, meta | change)
    if word: says(lambda: stopped(csv_set, cache, out), 'checkpoint_student_cl.safetensors', word)

@pytest.mark.parametrize('change', [dict(parts={'rotation':5}), dict(parts={'rotation':{}}),
                                    dict(parts={'rotation':{'L_c':[1., 'x'], 'L_r':[1., 2]}}), dict(smooth_loss=[1., 'x']),
                                    dict(smooth_loss=5), dict(groups=[5]), dict(groups=[dict(weight_decay='x')]),
                                    dict(values=['x']), dict(best=['x', 'y']), dict(scaler=5)])
def test_more_forged_checkpoints(csv_set, cache, tmp_path, change):
    out = stopped(csv_set, cache, tmp_path/'run')
    path = out/'checkpoint_student_cl.safetensors'
    tensors,meta = load_tensors(path)
    save_tensors(path, tensors, meta | change)
    says(lambda: stopped(csv_set, cache, out), 'checkpoint_student_cl.safetensors')

@pytest.mark.parametrize('change', ['lacks', 'more', 'shape', 'optimiser'])
def test_checkpoints_of_another_network(csv_set, cache, tmp_path, change):
    out = stopped(csv_set, cache, tmp_path/'run')
    path = out/'checkpoint_student_cl.safetensors'
    tensors,meta = load_tensors(path)
    k = next(k for k in tensors if k.startswith('model/backbone') and k.endswith('weight'))
    if change == 'lacks': del tensors[k]
    if change == 'more': tensors['model/more'] = torch.ones(1)
    if change == 'shape': tensors[k] = torch.ones(2)
    if change == 'optimiser': tensors['opt/999/momentum_buffer'] = torch.ones(2)
    save_tensors(path, tensors, meta)
    says(lambda: stopped(csv_set, cache, out), 'checkpoint_student_cl.safetensors')

def test_a_checkpoint_of_whole_numbers(csv_set, cache, tmp_path):
    out = stopped(csv_set, cache, tmp_path/'run')
    path = out/'checkpoint_student_cl.safetensors'
    tensors,meta = load_tensors(path)
    save_tensors(path, {k:v.to(torch.int8) if k.startswith('model/') else v for k,v in tensors.items()}, meta)
    says(lambda: stopped(csv_set, cache, out), 'holds torch.int8')

def test_an_optimiser_state_of_another_shape(csv_set, cache, tmp_path):
    "A fused optimiser would read beyond it"
    out = stopped(csv_set, cache, tmp_path/'run')
    path = out/'checkpoint_student_cl.safetensors'
    tensors,meta = load_tensors(path)
    save_tensors(path, {k:torch.zeros(3) if k.startswith('opt/1/') else v for k,v in tensors.items()}, meta)
    says(lambda: stopped(csv_set, cache, out), 'of shape (3,)')
