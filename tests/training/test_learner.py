"""fastai's ways with both stages' Learners, and what a fit leaves behind."""
import copy
import warnings

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.learner import Learner
from helpers import fit, net, same_state, stage_one_learner, stage_two_learner

from grdd_fastai.core.errors import UserError
from grdd_fastai.training.learner import FewShotLearner


class Stop(Callback):
    run_valid = False
    def after_batch(self): raise CancelFitException()

class Interrupt(Callback):
    run_valid = False
    def after_batch(self): raise KeyboardInterrupt()


def test_fit_one_cycle_lr_find_and_freeze_work(data):
    learn = stage_one_learner(data, keep_best=False)
    before = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar(): lr = learn.lr_find(num_it=10, show_plot=False).valley
    assert 0 < lr < 10 and same_state(before, learn.model.state_dict())
    learn.freeze()
    fit(learn, 1, .1, 'fit_one_cycle')
    now = learn.model.state_dict()
    assert torch.equal(before['backbone.stages.0.0.weight'], now['backbone.stages.0.0.weight'])
    assert (not torch.equal(before['backbone.head.weight'], now['backbone.head.weight'])
            and not torch.equal(before['rotation_head.weight'], now['rotation_head.weight']))
    learn.unfreeze()
    fit(learn, 1, .1, 'fit_one_cycle')
    assert not torch.equal(before['backbone.stages.0.0.weight'], learn.model.state_dict()['backbone.stages.0.0.weight'])
    assert max(learn.recorder.lrs) <= .1 and len(set(learn.recorder.lrs)) > 1

def test_predictions_of_base_images_work(data):
    learn = fit(stage_one_learner(data))
    with learn.no_bar(): p,y = learn.get_preds(dl=learn.dls.train.new(aug=None, shuffle=False, drop_last=False))
    assert p.shape == (120, 6) and torch.allclose(p.sum(1), torch.ones(120), atol=1e-4) and (y.numpy() == data.train.y).all()

@pytest.mark.parametrize('stage', [lambda d: stage_one_learner(d, amp=True), lambda d: stage_two_learner(d, net(5), amp=True)])
@pytest.mark.parametrize('cbs', [None, Stop()])
def test_a_fit_leaves_no_trace(data, stage, cbs):
    learn = stage(data)
    loss_func,metrics,rng = learn.loss_func,list(learn.metrics),torch.get_rng_state()
    fit(learn, 1, cbs=cbs)
    assert learn.loss_func is loss_func and list(learn.metrics) == metrics and torch.equal(rng, torch.get_rng_state())
    assert not learn.model._forward_hooks and not learn.model._forward_pre_hooks and not torch.is_autocast_enabled('cpu')

@pytest.mark.parametrize('stage', [lambda d, t: stage_one_learner(d, amp=True), lambda d, t: stage_two_learner(d, t, amp=True)])
def test_ctrl_c_leaves_no_trace_either(data, stage):
    teacher = net(5).train()
    learn,rng = stage(data, teacher),torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=Interrupt())
    assert not learn.model._forward_hooks and list(learn.metrics) == [] and torch.equal(rng, torch.get_rng_state())
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())
    fit(learn)
    names = list(learn.recorder.metric_names)
    assert len(names) == len(set(names))

def test_learners_use_no_name_of_their_learner_or_model(data):
    "fastai warns where a callback's attribute shadows the Learner's"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', category=UserWarning, message='.*lr_scheduler.*')
        fit(stage_one_learner(data)), fit(stage_two_learner(data, net(5)))

def test_an_error_in_a_callback_stays_one_sentence(data):
    learn = stage_one_learner(data)
    def diverged(): raise UserError('one sentence')
    learn.few_shot_accuracy.measure = diverged
    with pytest.raises(UserError) as e: fit(learn)
    assert str(e.value) == 'one sentence'

@pytest.mark.parametrize('arch', ['convnet4', pytest.param('resnet12', marks=pytest.mark.slow)])
def test_a_compiled_network_takes_the_same_steps(data, arch):
    "By a backend that traces and runs as it is; the network is copied, saved and trained on as any other"
    plain,compiled = (fit(stage_one_learner(data, arch=arch, compile=c, rotation=False, bs=60, keep_best=False), 1, .01)
                      for c in (False, dict(backend='eager')))
    assert compiled.model.backbone.stages._compiled_call_impl and not plain.model.backbone.stages._compiled_call_impl
    for (k,p),q in zip(plain.model.state_dict().items(), compiled.model.state_dict().values()): assert torch.allclose(p, q, atol=1e-5), k
    if arch == 'convnet4': fit(stage_two_learner(data, compiled.model.backbone, compiled.model.backbone, compile=dict(backend='eager')))

@pytest.mark.parametrize('arch', ['convnet4', 'resnet12_320'])
def test_a_network_is_compiled_once(data, arch):
    "Each part of the network has at most one unbroken graph for training and one for evaluation, and later epochs make no new ones"
    torch._dynamo.reset()
    graphs = []
    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward
    learn = stage_one_learner(data, arch=arch, compile=dict(backend=backend, fullgraph=True), rotation=False, bs=60, keep_best=False)
    fit(learn, 1, .01)
    first = len(graphs)
    fit(learn, 2, .01)
    parts = len(list(learn.model.backbone.children()))
    assert 0 < first <= 2*parts and len(graphs) == first

def test_formats_can_be_turned_off(data):
    a,b = (stage_one_learner(data, channels_last=on) for on in (True, False))
    weights = [learn.model.backbone.stages[1][0].weight for learn in (a, b)]
    assert weights[0].is_contiguous(memory_format=torch.channels_last) and not weights[1].is_contiguous(memory_format=torch.channels_last)
    for learn in (a, b): fit(learn, 1, .01)
    assert a.recorder.values[-1][0] == pytest.approx(b.recorder.values[-1][0], rel=1e-4)


def test_each_callback_hears_the_events_that_it_hears_from_fastais_own_call(data, monkeypatch):
    "Three callbacks: one defines methods, one is made from a keyword, and one turns itself off until the next fit"
    def heard():
        names = []
        class Own(Callback):
            def before_batch(self): names.append(f'batch {self.epoch} {self.iter}')
            def after_epoch(self): names.append('epoch')
            def after_fit(self): names.append('fit')
        class Off(Callback):
            def before_fit(self): self.run = False
            def after_batch(self): names.append('never')
        off = Off()
        by_keyword = Callback(before_step=lambda _: names.append('step'))
        learn = stage_one_learner(data, rotation=False, keep_best=False, cbs=[Own(), by_keyword, off])
        fit(learn, 2, .01)
        with pytest.raises(Exception, match='before_lunch'): learn('before_lunch')
        return names,off.run
    ours = heard()
    assert 'batch 1 0' in ours[0] and {'step', 'epoch', 'fit'} < {*ours[0]} and 'never' not in ours[0] and ours[1]
    monkeypatch.setattr(FewShotLearner, '_call_one', Learner._call_one)
    assert heard() == ours
