"""Means, intervals and differences: by hand, by scipy, over seeds."""
import numpy as np
import pytest
import torch
from helpers import Y
from scipy.stats import ttest_rel

from grdd_fastai.core.errors import UserError
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.fewshot.stats import Difference, Evaluation, compare, mean_ci95, over_seeds


def test_mean_ci95_by_hand(): assert mean_ci95([1, 3]) == (2, pytest.approx(1.96))

def test_paired_difference_is_far_tighter_than_two_intervals():
    g = torch.Generator().manual_seed(0)
    h = torch.eye(8)[Y] + .5*torch.randn(len(Y), 8, generator=g)
    a,b = evaluate(h, Y, n_episodes=500),evaluate(h + .05*torch.randn(h.shape, generator=g), Y, n_episodes=500)
    assert (a-b).mean == pytest.approx(a.accuracy - b.accuracy) and (a-b).ci95 < .5*a.ci95

def test_difference_is_scipys_paired_test():
    rng = np.random.default_rng(0)
    a,b = rng.normal(60, 10, 300),rng.normal(59, 10, 300)
    d = Evaluation(a) - Evaluation(b)
    assert d.p == pytest.approx(ttest_rel(a, b).pvalue) and d.mean == pytest.approx(a.mean() - b.mean())
    assert d.ci95 == pytest.approx(1.96*np.sqrt(((a-b - d.mean)**2).sum()/299/300))

def test_difference_of_a_model_with_itself_is_nothing():
    d = Evaluation(np.arange(5.)) - Evaluation(np.arange(5.))
    assert (d.mean, d.p, d.clear) == (0, 1., 0)

def test_p_is_uniform_where_there_is_no_difference():
    rng = np.random.default_rng(0)
    p = np.array([Difference(rng.normal(0, 1, 50)).p for _ in range(2000)])
    assert abs((p < .05).mean() - .05) < .015 and abs(np.median(p) - .5) < .04

def test_other_episodes_cannot_be_compared():
    h,y = torch.randn(160, 4),torch.arange(8).repeat_interleave(20)
    a = evaluate(h, y, n_episodes=20)
    for other in (dict(seed=1), dict(k_shot=2), dict(n_way=4)):
        with pytest.raises(UserError, match='the same episodes'): a - evaluate(h, y, **dict(n_episodes=20) | other)
    with pytest.raises(UserError, match='the same episodes'): a - evaluate(h, y.flip(0), n_episodes=20)
    assert (a - evaluate(h, y, n_episodes=20)).mean == 0

def test_an_order_holds_only_if_every_seed_says_so():
    up,down,unclear = Difference(np.array([1., 2, 3])),Difference(np.array([-1., -2, -3])),Difference(np.array([5., -4.]))
    assert [d.clear for d in (up, down, unclear)] == [1, -1, 0]
    assert over_seeds([up, up])['holds'] == 1 and over_seeds([down])['holds'] == -1
    assert over_seeds([up, down])['holds'] == over_seeds([up, unclear])['holds'] == 0
    assert over_seeds([up, down]) == dict(mean=0., sd=pytest.approx(np.std([2, -2], ddof=1)), seeds=2, holds=0)

def test_compare_takes_each_with_those_before_it_and_sums_up_over_seeds():
    "Three models of known distances, two seeds, noise shared by all: by hand"
    rng = np.random.default_rng(0)
    noise = {seed:rng.normal(0, 10, 50) for seed in (0, 1)}
    scores = {k:{seed:Evaluation(60 + up[seed] + e + rng.normal(0, .1, 50)) for seed,e in noise.items()} for k,up in
              dict(a=(0, 0), b=(1, 3), c=(2, -2)).items()}
    t = compare(scores).set_index(['row','versus','seed'])
    assert (len(t) == 9 and t.loc['b','a','all'].difference == pytest.approx(2, abs=.1)
            and t.loc['b','a','all'].sd == pytest.approx(2**.5, abs=.1))
    assert t.loc['b','a',1].difference == pytest.approx(3, abs=.1) and t.loc['b','a',1].ci95 < .1 and t.loc['b','a',1].p < 1e-9
    assert t.clear['b','a','all'] == 1 and t.clear['c','a',0] == 1 and t.clear['c','a',1] == -1 and t.clear['c','a','all'] == 0
    two = compare(dict(x=scores['a'][0], y=scores['b'][0]))
    assert len(two) == 1 and two.difference[0] == pytest.approx(t.loc['b','a',0].difference)
