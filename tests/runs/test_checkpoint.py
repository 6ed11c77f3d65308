"""Runs that are stopped, killed and continued: the same weights to the bit; damaged and forged checkpoints: a sentence."""
import json
import multiprocessing
import os
import random
import re
import signal
import threading
import time

import pytest
import torch
from fastai.callback.core import Callback
from helpers import child, fit, leavings, posix, recipe, says, settings, stage_one_learner, stopped

from grdd_fastai.core.device import LateNumber
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

def test_a_history_from_before_there_was_a_valid_loss():
    names = ['train_loss', 'valid_loss', 'L_c', 'accuracy']
    row = checkpoint.with_valid_loss([1., 2., 50.], names)
    assert row[0] == 1 and row[2:] == [2, 50] and row[1] != row[1] # NaN
    assert checkpoint.with_valid_loss([1., 3., 2., 50.], names) == [1, 3, 2, 50] and checkpoint.with_valid_loss([1., 2.], names) == [1, 2]

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


# ---- when and by whom a checkpoint is written -------------------------------------------------------------------------

class Slow:
    "`save_tensors` that waits for `gate` before it writes, and keeps what it was given"
    def __init__(self): self.gate,self.begun,self.written,self.most = threading.Event(),[],[],0
    def __call__(self, path, tensors, meta):
        self.begun.append(threading.current_thread())
        self.most = max(self.most, len(self.begun) - len(self.written))
        assert self.gate.wait(60)
        save_tensors(path, tensors, meta)
        self.written.append(meta)

class Each(Callback):
    "Call `f` after each step"
    order = 71 # after `Checkpoint`
    run_valid = False
    def __init__(self, f): self.f = f
    def after_batch(self): self.f(self.epoch, self.iter)

def trained(data, path, minutes=0, each=lambda epoch, step: None, cbs=()):
    "A Learner after two epochs of four steps with a checkpoint at `path`"
    learn = stage_one_learner(data, bs=30)
    learn.add_cbs([checkpoint.SkipBatches(), checkpoint.StopOnNaN('net'), Each(each), *cbs,
                   checkpoint.Checkpoint(path, lambda: dict(stage='net'), checkpoint.Deadline(), minutes)])
    return fit(learn, 2, .01)

def test_training_goes_on_while_one_checkpoint_is_written(data, tmp_path, monkeypatch):
    "Every step is due. The first one is written until the fifth step is done; what it holds is the state of the first step"
    slow,states,path = Slow(),[],tmp_path/'checkpoint.safetensors'
    monkeypatch.setattr(checkpoint, 'save_tensors', slow)
    def each(epoch, step):
        states.append((epoch, step + 1))
        if len(states) == 5: slow.gate.set()
    trained(data, path, each=each)
    assert slow.most == 1 and slow.begun[0] is not threading.main_thread() and len(states) == 8
    places = [(meta['epoch'], meta['step']) for meta in slow.written]
    assert places[0] == (0, 1) and places[1] > (1, 0) and places == sorted(places)
    assert load_tensors(path)[1]['step'] == slow.written[-1]['step'] # the fit ended after the last one was written

def test_a_checkpoint_holds_the_step_at_which_it_was_due(data, tmp_path, monkeypatch):
    "Training changes the weights while the thread waits"
    slow,weights,given = Slow(),[],{}
    def save(path, tensors, meta):
        slow(path, tensors, meta)
        given.setdefault('first', tensors)
    monkeypatch.setattr(checkpoint, 'save_tensors', save)
    class Weights(Callback):
        order = 71 # after `Checkpoint`
        run_valid = False
        def after_batch(self):
            weights.append(self.model.backbone.stages[0][0].weight.detach().clone())
            if len(weights) == 8: slow.gate.set()
    trained(data, tmp_path/'checkpoint', cbs=[Weights()])
    found = given['first']['model/backbone.stages.0.0.weight']
    assert torch.equal(found, weights[0]) and not torch.equal(found, weights[-1])

@pytest.mark.parametrize('minutes, expected', [(5, [(1, 2)]), (2.5, [(1, 0), (2, 0)])])
def test_checkpoints_come_by_time_and_not_by_epochs(data, tmp_path, monkeypatch, minutes, expected):
    "A step takes a minute, and each epoch has four"
    clock,places = [0.],[]
    monkeypatch.setattr(checkpoint.time, 'monotonic', lambda: clock[0])
    monkeypatch.setattr(checkpoint, 'save_tensors', lambda path, tensors, meta: places.append((meta['epoch'], meta['step'])))
    def each(epoch, step): clock[0] += 60
    trained(data, tmp_path/'checkpoint', minutes=minutes, each=each)
    assert places == expected

def test_only_the_first_of_several_processes_writes(data, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, 'rank_world', lambda: (1, 1))
    trained(data, tmp_path/'checkpoint')
    assert not list(tmp_path.iterdir())

def test_an_error_of_the_thread_ends_the_fit(data, tmp_path, monkeypatch):
    def full(path, tensors, meta): raise UserError(f'{path} cannot be written (No space left on device)')
    monkeypatch.setattr(checkpoint, 'save_tensors', full)
    with pytest.raises(UserError, match='No space left on device'): trained(data, tmp_path/'checkpoint')

def test_weights_that_are_not_finite_replace_no_checkpoint(data, tmp_path):
    "The loss is still finite: a weight that no image uses"
    path = tmp_path/'checkpoint.safetensors'
    class Spoil(Callback):
        run_valid = False
        order = 60
        def after_batch(self):
            if (self.epoch, self.iter) == (1, 1): self.model.backbone.stages[0][1].running_mean[0] = float('nan')
    with pytest.raises(UserError, match=r'net, epoch 1, step [23]: model/backbone.stages.0.1.running_mean holds NaN'):
        trained(data, path, cbs=[Spoil()])
    tensors,meta = load_tensors(path)
    assert all(torch.isfinite(v).all() for v in tensors.values()) and (meta['epoch'], meta['step']) <= (1, 1)

@pytest.mark.parametrize('late', [False, True])
def test_a_loss_that_is_not_finite_is_reported_with_its_own_step(data, tmp_path, monkeypatch, late):
    "Also where the number arrives a step late, as on a GPU, and when it is the epoch's last"
    monkeypatch.setattr(LateNumber, 'is_late', staticmethod(lambda scalar: late))
    monkeypatch.setattr(LateNumber, 'send', lambda self, scalar: setattr(self, 'sent', scalar.clone()))
    for at in ((0, 2), (1, 3)):
        class Break(Callback):
            order = 60 # after the terms of the loss
            run_valid = False
            def after_loss(self):
                if (self.epoch, self.iter) == at: self.learn.loss = self.learn.loss*float('nan')  # noqa: B023
        learn = stage_one_learner(data, bs=30)
        learn.add_cbs([checkpoint.SkipBatches(), Break(), checkpoint.StopOnNaN('net')])
        with pytest.raises(UserError, match=rf'net, epoch {at[0]}, step {at[1]}: the loss is nan'): fit(learn, 2, .01)


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
