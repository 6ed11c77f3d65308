"""Mixed precision, seeds, the terms of a loss, and what a recorder holds on to."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import AvgSmoothLoss
from helpers import Grab, fit, net, same_state, stage_one_learner, stage_two_learner
from torch._subclasses.fake_tensor import FakeTensorMode

from grdd_fastai.core.device import LateNumber, autocast_dtype, seed_generators
from grdd_fastai.models.create import create_backbone
from grdd_fastai.training.callbacks import Autocast, LossTerm

# ---- mixed precision --------------------------------------------------------------------------------------------------

@pytest.fixture
def half(monkeypatch): monkeypatch.setattr('grdd_fastai.training.callbacks.autocast_dtype', lambda device: torch.float16)

def test_float16_gradients_are_scaled_and_the_steps_those_of_float32(data, half):
    "A CPU can do it too, slowly: the scale is in the backward pass and out of the step"
    seen = []
    class Look(Callback):
        def before_step(self): seen.append((self.learn.scaler.get_scale(), self.loss_grad.item()/self.learn.loss.item()))
    a,b = (fit(stage_one_learner(data, amp=amp, cbs=[Grab(), Look()] if amp else Grab(), keep_best=False), 2, .02) for amp in (True, False))
    assert seen and all(scale == factor_near(factor) for scale,factor in seen)
    assert a.grab.losses == pytest.approx(b.grab.losses, rel=2e-2) and a.grab.losses != b.grab.losses
    for p,q in zip(a.model.parameters(), b.model.parameters()): assert torch.allclose(p, q, atol=2e-2)
    assert a.scaler is None

def factor_near(x): return 2.**round(torch.tensor(x).log2().item())

def test_a_step_whose_gradients_overflow_is_left_out(data, half):
    scales = []
    class Overflow(Callback):
        order = 5
        def after_loss(self):
            if self.iter == 1: self.learn.loss_grad = self.loss_grad*1e37
        def after_batch(self): scales.append(self.learn.scaler.get_scale())
    learn = fit(stage_one_learner(data, amp=True, rotation=False, bs=30, cbs=[Overflow(), Grab()], keep_best=False), 1, .02)
    w = learn.grab.weights
    params = [k for k,_ in learn.model.named_parameters()]
    assert scales[:3] == [65536., 32768., 32768.]
    assert all(torch.equal(w[1][k], w[2][k]) for k in params) and not all(torch.equal(w[2][k], w[3][k]) for k in params)

@pytest.mark.skipif(autocast_dtype(torch.device('cpu')) is None, reason='this CPU does not compute in bfloat16')
def test_autocast_reaches_the_network_and_not_the_loss(data):
    learn,seen = stage_one_learner(data, amp=True),[]
    learn.model.backbone.stages[0][0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    class Look(Callback):
        order = Autocast.order+5
        def after_loss(self): seen.append((self.pred.dtype, self.learn.loss_grad.dtype))
    fit(learn, cbs=Look())
    assert torch.bfloat16 in seen and (torch.float32, torch.float32) in seen


# ---- accumulated gradients --------------------------------------------------------------------------------------------

def without_norm(arch_or_net):
    "A ConvNet-4 whose images do not see each other: accumulated gradients can be those of the whole batch"
    net = create_backbone(arch_or_net, 6, 16) if isinstance(arch_or_net, str) else arch_or_net
    for block in net.stages: block[1] = torch.nn.Identity()
    return net

class Gradients(Callback):
    "The gradient of each optimiser step"
    order,run_valid = 1000,False
    def before_fit(self): self.grads,self.logged = [],[]
    def before_step(self): self.grads.append([p.grad.clone() for p in self.model.parameters()])
    def after_batch(self): self.logged.append(self.learn.loss.item())

@pytest.mark.parametrize('clip', [None, 1e-2])
@pytest.mark.parametrize('stage', ['one', 'two'])
def test_accumulated_gradients_are_those_of_one_large_batch(data, stage, clip):
    "All terms of the loss are scaled alike, and what is logged stays what it is"
    def learner(n, *cbs):
        cbs = [Gradients(), *cbs, *([GradientClip(clip)] if clip else [])]
        if stage == 'one': return stage_one_learner(data, arch=without_norm('convnet4'), bs=120//n, keep_best=False, cbs=cbs)
        return stage_two_learner(data, without_norm(net(2)), without_norm(net(1)), n_episodes=4, episodes_per_step=4//n, keep_best=False,
                                 cbs=cbs)
    images = 120 if stage == 'one' else 4*3*(2+4)
    whole,parts = fit(learner(1), 1, 1e-6),fit(learner(4, GradientAccumulation(images)), 1, 1e-6)
    assert len(whole.gradients.grads) == len(parts.gradients.grads) == 1
    for a,b in zip(whole.gradients.grads[0], parts.gradients.grads[0]):
        assert a.abs().max() > 0 and torch.allclose(a, b, rtol=1e-3, atol=1e-5*a.abs().max().item())
    assert whole.gradients.logged[0] == pytest.approx(np.mean(parts.gradients.logged), rel=1e-4)
    rows = [dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1])) for learn in (whole, parts)]
    for k in ('L_c', 'L_r') if stage == 'one' else ('L_kl', 'L_rt'): assert rows[0][k] == pytest.approx(rows[1][k], rel=1e-4)


# ---- seeds and numbers ------------------------------------------------------------------------------------------------

def test_same_seed_same_weights_whatever_the_callers_random_state(data):
    def run(seed, caller):
        torch.manual_seed(caller)
        return fit(stage_one_learner(data, arch='resnet12', seed=seed, aug='default', bs=30, rotation=False), 1).model.state_dict()
    a,b,c = run(0, 1),run(0, 2),run(1, 1)
    assert same_state(a, b) and not same_state(a, c)

def test_a_second_fit_sees_new_augmentations(data):
    learn = stage_one_learner(data, aug='default', cbs=Grab(), keep_best=False, rotation=False)
    fit(learn)
    first = learn.grab.x
    fit(learn)
    assert not torch.equal(first[0].sort(0).values, learn.grab.x[0].sort(0).values)

def test_the_recorder_keeps_numbers(data):
    "A tensor a step, each in a place of its own, keeps the allocator from using the memory around it again"
    learn = fit(stage_two_learner(data, net(5), n_episodes=4))
    assert len(learn.recorder.losses) == 4 and all(isinstance(v, float) for v in learn.recorder.losses)
    learn.recorder.plot_loss(with_valid=False)

def test_numbers_that_arrive_a_step_late_are_the_same(data, monkeypatch):
    "As from a GPU: no step reads its own loss, and the progress bar shows the one before"
    plain = fit(stage_two_learner(data, net(5), n_episodes=4), 2)
    monkeypatch.setattr(LateNumber, 'is_late', staticmethod(lambda scalar: True))
    monkeypatch.setattr(LateNumber, 'send', lambda self, scalar: setattr(self, 'sent', scalar.clone()))
    shown = []
    class Bar(Callback):
        order = 60 # as fastai's ProgressCallback
        run_valid = False
        def after_batch(self): shown.append(self.smooth_loss.item())
    late = stage_two_learner(data, net(5), n_episodes=4)
    late.add_cb(Bar())
    fit(late, 2)
    assert late.recorder.losses == plain.recorder.losses and len(shown) == 8
    assert np.isnan(shown[0]) and shown[1:] == pytest.approx(plain.recorder.losses[:-1])

def test_the_smoothed_loss_is_fastais(data):
    "fastai's own class on the same losses"
    theirs,losses = AvgSmoothLoss(),[]
    class Theirs(Callback):
        run_valid = False
        def before_fit(self): theirs.reset()
        def after_batch(self):
            theirs.accumulate(self.learn)
            losses.append(theirs.value.item())
    learn = stage_one_learner(data)
    learn.add_cb(Theirs())
    assert fit(learn).recorder.losses == losses

def test_totals_that_a_checkpoint_brings_back_go_to_the_gpu():
    "By fake tensors, which need no GPU: what was counted before the stop is a number, the next loss is on the GPU"
    class Term(LossTerm):
        parts = ('L_x',)
    with FakeTensorMode():
        term = Term()
        term.learn = SimpleNamespace(loss_grad=torch.zeros((), device='cuda'))
        term.totals = dict(L_x=[1.5, 2])
        term.set_loss(torch.zeros((), device='cuda'), L_x=torch.ones((), device='cuda'))
        assert term.totals['L_x'][0].device.type == 'cuda' and term.totals['L_x'][1] == 3

def test_generators_are_seeded_as_by_torch():
    seed_generators('cpu', 2**40)
    ours = torch.rand(3)
    torch.manual_seed(2**40)
    assert torch.equal(torch.rand(3), ours)
