"""Mixed precision, torch.compile, and what a long fit holds on to."""
import copy

import pytest
import torch
from fastai.callback.core import Callback
from test_learners import Grab, fit, net, same_state, stage_one, stage_two

from grdd_fastai.core.device import autocast_dtype


@pytest.fixture
def half(monkeypatch): monkeypatch.setattr('grdd_fastai.training.callbacks.autocast_dtype', lambda device: torch.float16)


def test_float16_gradients_are_scaled_and_the_steps_those_of_float32(data, half):
    "A CPU can do it too, slowly: the scale is in the backward pass and out of the step"
    seen = []
    class Look(Callback):
        def before_step(self): seen.append((self.learn.scaler.get_scale(), self.loss_grad.item()/self.learn.loss.item()))
    a,b = (fit(stage_one(data, amp=amp, cbs=[Grab(), Look()] if amp else Grab(), keep_best=False), 2, .02) for amp in (True, False))
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
    learn = fit(stage_one(data, amp=True, rotation=False, bs=30, cbs=[Overflow(), Grab()], keep_best=False), 1, .02)
    w = learn.grab.weights
    params = [k for k,_ in learn.model.named_parameters()]
    assert scales[:3] == [65536., 32768., 32768.]
    assert all(torch.equal(w[1][k], w[2][k]) for k in params) and not all(torch.equal(w[2][k], w[3][k]) for k in params)

@pytest.mark.parametrize('supported, dtype', [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_without_bfloat16_gets_float16(monkeypatch, supported, dtype):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: supported)
    assert autocast_dtype(torch.device('cuda')) is dtype and autocast_dtype(torch.device('meta')) is None

@pytest.mark.parametrize('arch', ['convnet4', pytest.param('resnet12', marks=pytest.mark.slow)])
def test_a_compiled_network_takes_the_same_steps(data, arch):
    "By a backend that traces and runs as it is; the network is copied, saved and trained on as any other"
    plain,compiled = (fit(stage_one(data, arch=arch, compile=c, rotation=False, bs=60, keep_best=False), 1, .01)
                      for c in (False, dict(backend='eager')))
    assert compiled.model.backbone.stages._compiled_call_impl and not plain.model.backbone.stages._compiled_call_impl
    for (k,p),q in zip(plain.model.state_dict().items(), compiled.model.state_dict().values()): assert torch.allclose(p, q, atol=1e-5), k
    if arch == 'convnet4': fit(stage_two(data, compiled.model.backbone, compiled.model.backbone, compile=dict(backend='eager')))

def test_formats_can_be_turned_off(data):
    a,b = (stage_one(data, channels_last=on) for on in (True, False))
    weights = [learn.model.backbone.stages[1][0].weight for learn in (a, b)]
    assert weights[0].is_contiguous(memory_format=torch.channels_last) and not weights[1].is_contiguous(memory_format=torch.channels_last)
    for learn in (a, b): fit(learn, 1, .01)
    assert a.recorder.values[-1][0] == pytest.approx(b.recorder.values[-1][0], rel=1e-4)

def test_dropblock_counts_on_after_weights_are_loaded(data):
    learn = stage_one(data, arch='resnet12', rotation=False, bs=60, keep_best=False)
    drop,start = learn.model.backbone.stages[3].drop,copy.deepcopy(learn.model.state_dict())
    fit(learn, 1, .01)
    assert drop.step.item() == 2
    learn.model.load_state_dict(start)
    fit(learn, 1, .01)
    assert drop.step.item() == 2 and drop.rate().item() == pytest.approx(.1*2/40_000) and not same_state(start, learn.model.state_dict())

def test_the_recorder_keeps_numbers(data):
    "A tensor a step, each in a place of its own, keeps the allocator from using the memory around it again"
    learn = fit(stage_two(data, net(5), n_episodes=4))
    assert len(learn.recorder.losses) == 4 and all(isinstance(v, float) for v in learn.recorder.losses)
    learn.recorder.plot_loss(with_valid=False)
