"""Learning rates by hand."""
import numpy as np
import pytest
from helpers import fit, stage_one_learner, stage_two_learner

from grdd_fastai.core.errors import UserError
from grdd_fastai.stage_one import StageOne, stage_one
from grdd_fastai.training.schedules import poly, step_down


def test_schedules_by_hand(data):
    assert poly(.1)(0) == .1 and poly(.1)(.5) == pytest.approx(.1*.5**.9) and poly(.1)(1) == 0
    assert [step_down(1)(e/15) for e in (0, 9, 10, 14)] == [1, 1, .1, .1]
    learn = stage_two_learner(data, n_episodes=3)
    fit(learn, 3, .01, 'fit_step')
    assert np.allclose(learn.recorder.lrs, [.01]*6 + [.001]*3)
    learn = stage_one_learner(data)
    fit(learn, 2, .05, 'fit_poly')
    assert np.allclose(learn.recorder.lrs, [.05*(1-i/4)**.9 for i in range(4)])

def test_a_warmup_by_hand(data):
    "The warm-up takes two of six steps: the rate is 0, then half of the plain schedule's rate, and the plain schedule's rate from then on"
    learn,fit = stage_one(data, StageOne(arch='convnet4', epochs=3, lr=.05, warmup=1, rotation=False, bs=len(data.train)//2))
    with learn.no_bar(), learn.no_logging(): fit(learn)
    plain = [.05*(1-i/6)**.9 for i in range(6)]
    assert np.allclose(learn.recorder.lrs, [0, plain[1]/2, *plain[2:]])

@pytest.mark.parametrize('wrong, says', [
    (dict(warmup=1, schedule='one_cycle'), "warmup has no effect with schedule='one_cycle'"),
    (dict(warmup=90), 'warmup is 90 of 90 epochs'), (dict(warmup=-1.), 'warmup')])
def test_a_warmup_that_cannot_be(wrong, says):
    with pytest.raises(UserError, match=says): StageOne(**wrong)
