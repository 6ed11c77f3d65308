"""Few-shot accuracy while a Learner trains: that of the validation classes, and the best epoch kept."""
import copy
from types import SimpleNamespace

import pytest
from fastai.callback.core import Callback
from helpers import VALID, Grab, fit, net, same_state, stage_one_learner

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import episodic_dls, plain_dl
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.stage_two import meta_learner
from grdd_fastai.training.validation import FewShotAccuracy


def test_accuracy_shown_is_that_of_the_validation_classes(data):
    learn = fit(stage_one_learner(data, keep_best=False))
    h,y = embed(learn.model.backbone, plain_dl(data, 'val'))
    assert learn.recorder.values[-1][-1] == pytest.approx(evaluate(h, y, **VALID).accuracy)

def test_validate_is_accuracy_on_the_validation_classes(data):
    learn = stage_one_learner(data)
    h,y = embed(learn.model.backbone, plain_dl(data, 'val'))
    assert learn.validate()[0] == pytest.approx(evaluate(h, y, **VALID).accuracy)

def test_best_epoch_on_validation_is_kept(data):
    learn,states,accs = stage_one_learner(data),[],iter([30., 50., 40.])
    learn.few_shot_accuracy.measure = lambda: SimpleNamespace(accuracy=next(accs))
    class Keep(Callback):
        order = 200
        def after_epoch(self): states.append(copy.deepcopy(self.model.state_dict()))
    fit(learn, 3, .1, cbs=Keep())
    assert (learn.keep_best.best, learn.keep_best.best_epoch) == (50, 1)
    assert same_state(learn.model.state_dict(), states[1]) and not same_state(states[1], states[2])

def test_few_shot_accuracy_is_silent_in_lr_find(data):
    learn,calls = stage_one_learner(data),[]
    learn.few_shot_accuracy.measure = lambda: calls.append(1)
    with learn.no_bar(): learn.lr_find(num_it=4, show_plot=False)
    assert not calls and isinstance(learn.few_shot_accuracy, FewShotAccuracy)

def test_training_may_be_wider_than_validation(data):
    learn = meta_learner(episodic_dls(data, 6, 1, 3, 2), net(1), valid=dict(n_query=5, n_episodes=10))
    assert fit(learn).few_shot_accuracy.episodes['n_way'] == 5

def test_impossible_validation_is_an_error_before_training(data):
    learn = meta_learner(episodic_dls(data, 3, 1, 3, 2), net(1), valid=dict(n_way=7), cbs=Grab())
    with pytest.raises(UserError, match='validation set has 6 classes, too few for 7-way'): fit(learn)
    assert 'losses' not in vars(learn.grab)
