"""Runs that are stopped, killed and continued: the same weights to the bit; files that are damaged: a sentence."""
import json
import multiprocessing
import os
import random
import re
import signal
import time

import numpy as np
import pytest
import torch
from test_recipes import recipe

from grdd_fastai.core import storage
from grdd_fastai.core.errors import UserError
from grdd_fastai.core.storage import load_tensors, save_tensors
from grdd_fastai.runs import checkpoint

SMALL = dict(teacher='convnet4', student='convnet4_128', epochs=2, meta_epochs=2, episodes=3, test_episodes=20, query=3, bs=40)
STAGES = ('student_cl','teacher','student_grdd')

def settings(csv_set, cache, **kwargs): return {**SMALL, 'data':str(csv_set), 'cache':str(cache), **kwargs}

def leavings(out):
    "What a run comes to: names and bytes of its weights, cards and histories, and its result but for the time"
    result = json.loads((out/'result.json').read_text())
    files = {p.name:p.read_bytes() for p in out.iterdir() if p.suffix in ('.safetensors','.csv') or p.stem in STAGES}
    return files,{k:v for k,v in result.items() if k != 'seconds'}

@pytest.fixture(scope='module')
def undisturbed(csv_set, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp('undisturbed')/'run'
    recipe('cifarfs_5w1s')(out=str(out), **settings(csv_set, cache))
    want = leavings(out)
    assert set(want[0]) == {f'{s}.{x}' for s in STAGES for x in ('safetensors','json')} | {f'history_{s}.csv' for s in STAGES}
    return want


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

# ---- kill -9 ----------------------------------------------------------------------------------------------------------

def child(out, kwargs, threads, die_at_write):
    "The recipe in a process of its own that checkpoints at every step and may die inside its n-th file write"
    torch.set_num_threads(threads)
    checkpoint.MINUTES = 0
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(os.open(f'{out}.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    if die_at_write is not None:
        n,how = die_at_write
        names = ('fsync','replace','sync_folder') # before the rename, instead of it, after it
        left,real = [n],{k:getattr(storage if k == 'sync_folder' else os, k) for k in names}
        def maybe_die(k):
            def f(*args, **kw):
                if k == names[how]:
                    left[0] -= 1
                    if left[0] <= 0: os.kill(os.getpid(), signal.SIGKILL)
                return real[k](*args, **kw)
            return f
        os.fsync,os.replace,storage.sync_folder = maybe_die('fsync'),maybe_die('replace'),maybe_die('sync_folder')
    recipe('cifarfs_5w1s')(out=str(out), resume=True, **kwargs)

@pytest.mark.slow
@pytest.mark.skipif(os.name != 'posix', reason='SIGKILL is POSIX')
def test_kill_dash_nine_at_any_moment_loses_nothing(csv_set, cache, tmp_path, undisturbed):
    "At least 24 kills, at random times and inside writes, over as many runs as they take; the lock of the dead is no obstacle"
    rng,ctx,kills,runs = random.Random(0),multiprocessing.get_context('forkserver'),[],0
    ctx.set_forkserver_preload(['grdd_fastai.all', 'test_resume'])
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

# ---- signals, locks, refusals -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits_with_its_code(csv_set, cache, tmp_path, undisturbed, monkeypatch, number, code):
    out,hits = tmp_path/'run',[]
    class Signal(checkpoint.SkipBatches):
        name = 'skip_batches'
        def after_loss(self):
            if not hits: hits.append(1); os.kill(os.getpid(), number)
    monkeypatch.setattr('grdd_fastai.runs.run.SkipBatches', Signal)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as e: recipe('cifarfs_5w1s')(out=str(out), **settings(csv_set, cache))
    assert e.value.code == code and signal.getsignal(number) is before and (out/'checkpoint_student_cl.safetensors').exists()
    assert json.loads((out/'result.json').read_text())['status'] == 'stopped'
    recipe('cifarfs_5w1s')(out=str(out), resume=True, **settings(csv_set, cache))
    assert leavings(out) == undisturbed

def stopped(csv_set, cache, out, sessions=1):
    for _ in range(sessions): recipe('cifarfs_5w1s')(out=str(out), resume=True, max_minutes=1e-9, **settings(csv_set, cache))
    return out

def test_other_settings_or_data_are_refused(csv_set, cache, tmp_path):
    from conftest import write_csv_set
    out,main = stopped(csv_set, cache, tmp_path/'run'),recipe('cifarfs_5w1s')
    with pytest.raises(UserError, match='started with lr=0.05, not 0.1'): main(out=str(out), resume=True, **settings(csv_set, cache, lr=.1))
    root = write_csv_set(tmp_path/'set', n_images=8)
    out = tmp_path/'other'
    main(out=str(out), resume=True, max_minutes=1e-9, **settings(root, cache))
    (root/'images'/'train0'/'00.png').write_bytes((root/'images'/'train0'/'01.png').read_bytes())
    with pytest.raises(UserError, match='the data changed'): main(out=str(out), resume=True, **settings(root, cache))

def test_two_runs_in_one_folder(csv_set, cache, tmp_path):
    (tmp_path/'run').mkdir()
    with storage.locked(tmp_path/'run'/'.lock'):
        with pytest.raises(UserError, match='another run is at work'):
            recipe('cifarfs_5w1s')(out=str(tmp_path/'run'), **settings(csv_set, cache))

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

def test_damaged_stage_weights_are_one_sentence(csv_set, cache, tmp_path):
    out = tmp_path/'run'
    while not (out/'student_cl.json').exists(): stopped(csv_set, cache, out)
    (out/'student_cl.safetensors').write_bytes((out/'student_cl.safetensors').read_bytes()[:-1] + b'\0')
    with pytest.raises(UserError, match='student_cl.safetensors and its .json cannot be used'): stopped(csv_set, cache, out)

def test_a_loss_that_is_not_finite_stops_with_epoch_and_step(csv_set, cache, tmp_path):
    with pytest.raises(UserError, match=r'student_cl, epoch \d+, step \d+: .*lower the learning rate'):
        recipe('cifarfs_5w1s')(out=str(tmp_path/'run'), **settings(csv_set, cache, lr=1e30, epochs=3))

def test_a_full_disk_is_one_sentence_and_keeps_what_was_there(tmp_path, monkeypatch):
    save_tensors(tmp_path/'x', dict(a=torch.ones(2)), dict(n=1))
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='No space left on device'): save_tensors(tmp_path/'x', dict(a=torch.zeros(2)), dict(n=2))
    tensors,meta = load_tensors(tmp_path/'x')
    assert meta == dict(n=1) and tensors['a'].tolist() == [1, 1] and [p.name for p in tmp_path.iterdir()] == ['x']

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

def test_deterministic_is_for_the_run_alone(csv_set, cache, tmp_path, undisturbed):
    r = recipe('cifarfs_5w1s')(out=str(tmp_path/'run'), deterministic=True, **settings(csv_set, cache))
    assert not torch.are_deterministic_algorithms_enabled() and r['accuracy'] == undisturbed[1]['accuracy']

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu_deterministic_runs_repeat_to_the_bit(csv_set, cache, tmp_path):
    for n in 'ab': recipe('cifarfs_5w1s')(out=str(tmp_path/n), deterministic=True, **settings(csv_set, cache))
    assert leavings(tmp_path/'a') == leavings(tmp_path/'b')

def test_saving_is_the_same_bytes_each_time(tmp_path):
    t = dict(a=torch.randn(3, 4), b=torch.arange(5), c=torch.randn(2).bfloat16())
    for n in 'xy': save_tensors(tmp_path/n, t, dict(k=[1, 2.5], j='é'))
    assert (tmp_path/'x').read_bytes() == (tmp_path/'y').read_bytes()
    back,meta = load_tensors(tmp_path/'x')
    assert all(torch.equal(back[k], t[k]) and back[k].dtype == t[k].dtype for k in t) and meta == dict(k=[1, 2.5], j='é')

def test_every_flipped_bit_and_cut_of_a_checkpoint_is_noticed(tmp_path):
    path,rng = tmp_path/'x',np.random.default_rng(0)
    save_tensors(path, dict(a=torch.randn(8, 4), n=torch.arange(3)), dict(epoch=1))
    whole = path.read_bytes()
    for _ in range(60):
        b = bytearray(whole)
        b[rng.integers(len(b))] ^= 1 << int(rng.integers(8))
        path.write_bytes(b)
        try: tensors,meta = load_tensors(path)
        except UserError as e: assert 'damaged' in str(e)
        else: assert torch.equal(tensors['n'], torch.arange(3)) and meta == dict(epoch=1) # white space of the header
    for n in range(0, len(whole), 7):
        path.write_bytes(whole[:n])
        with pytest.raises(UserError, match='damaged'): load_tensors(path)
