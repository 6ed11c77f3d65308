"""Learning rates by hand."""
import numpy as np
import pytest
from helpers import fit, stage_one_learner, stage_two_learner

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
