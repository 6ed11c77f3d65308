"""The moving average of the weights: by hand, measured, kept, and gone on with after a stop."""
import copy

import pytest
import torch
from fastai.callback.core import Callback
from helpers import VALID, fit, net, same_state, stage_one_learner, stage_two_learner

from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.training.ema import EMA


class States(Callback):
    "Copies of the weights after each step, and of the moving average after each epoch"
    order = 200
    run_valid = False
    def __init__(self): self.steps,self.averages = [],[]
    def after_step(self): self.steps.append(copy.deepcopy(self.model.state_dict()))
    def after_epoch(self):
        if hasattr(self.learn, 'ema'): self.averages.append(copy.deepcopy(self.learn.ema.average.state_dict()))

def by_hand(start, steps, decay):
    "A loop over the steps t = 0, 1, ...: d = min(decay, 1 - (1 + t)^(-2/3)), average = d average + (1 - d) weights"
    average = {k:v.clone() for k,v in start.items()}
    for t,state in enumerate(steps):
        d = min(decay, 1 - (1 + t)**(-2/3))
        for k,v in state.items(): average[k] = d*average[k] + (1 - d)*v if v.is_floating_point() else v
    return average

STAGES = {'one': stage_one_learner, 'two': lambda data, **kwargs: stage_two_learner(data, net(5), **kwargs)}

@pytest.mark.parametrize('decay', [.5, .999])
@pytest.mark.parametrize('stage', STAGES)
def test_the_average_is_that_of_a_loop(data, stage, decay):
    learn = STAGES[stage](data, ema_decay=decay, keep_best=False)
    start,states = copy.deepcopy(learn.model.state_dict()),States()
    fit(learn, 3, .1, cbs=states)
    want = by_hand(start, states.steps, decay)
    got = learn.model.state_dict() # a fit without KeepBest ends with the average
    assert len(states.steps) > 4 and all(torch.allclose(v.float(), want[k].float(), atol=1e-5) for k,v in got.items())
    assert not any(torch.allclose(v, states.steps[-1][k], atol=1e-4) for k,v in got.items() if k.endswith('0.weight'))

def test_the_steps_do_not_see_the_average(data):
    "As with lr_find, which keeps none"
    with_ema,without = States(),States()
    fit(stage_one_learner(data, ema_decay=.9), 2, .1, cbs=with_ema), fit(stage_one_learner(data), 2, .1, cbs=without)
    assert all(map(same_state, with_ema.steps, without.steps)) and len(without.steps) == len(with_ema.steps)
    learn = stage_one_learner(data, ema_decay=.9)
    before = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar(): learn.lr_find(num_it=4, show_plot=False)
    assert same_state(before, learn.model.state_dict()) and learn.ema.average is None

def test_the_accuracy_and_the_best_weights_are_the_averages(data):
    learn,states = stage_one_learner(data, ema_decay=.9),States()
    fit(learn, 3, .1, cbs=states)
    accuracies = [row[-1] for row in learn.recorder.values]
    best = learn.keep_best.best_epoch
    assert best == max(range(3), key=lambda e: accuracies[e]) and same_state(learn.model.state_dict(), states.averages[best])
    h,y = embed(learn.model.backbone, plain_dl(data, 'val'))
    assert accuracies[best] == pytest.approx(evaluate(h, y, **VALID).accuracy)

def test_a_stopped_fit_ends_without_the_average(data):
    class Stop(Callback):
        run_valid = False
        def after_batch(self): raise KeyboardInterrupt()
    learn = stage_one_learner(data, ema_decay=.9)
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=Stop())
    assert learn.ema.average is None and isinstance(learn.ema, EMA)
    fit(learn)
