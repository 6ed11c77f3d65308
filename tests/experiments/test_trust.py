"""Test the measurement of what a FewShotClassifier says of itself: by a naive loop, on classes with a known answer, and as a recipe."""
import json

import numpy as np
import pytest
import torch
from helpers import recipe, says

from grdd_fastai.experiments.trust import calibration_error, draw, row
from grdd_fastai.fewshot.classifiers import CLASSIFIERS


def test_calibration_error_by_a_loop():
    rng = np.random.default_rng(0)
    p = np.round(rng.random(500), 2) # with borders of bins among them
    right = rng.random(500) < p**2
    bins = [[] for _ in range(15)]
    for i,v in enumerate(p): bins[max(0, next(k for k in range(15) if v <= (k + 1)/15))].append(i)
    want = sum(len(b)/500*abs(p[b].mean() - right[b].mean()) for b in bins if b)
    assert calibration_error(p, right) == pytest.approx(want) and want > .05
    assert calibration_error(np.array([1., 1, .5, .5]), np.array([True, True, True, False])) == 0

def test_what_is_drawn_is_disjoint():
    labels = np.repeat(np.arange(5), 20)
    support,new,others,known = draw(labels, 3, 4, 10, np.random.default_rng(0))
    assert (len(support), len(new), len(others)) == (12, 30, 30) and len({*support, *new, *others}) == 72
    assert sorted(set(labels[support])) == sorted(set(labels[new])) == sorted(known) and not set(labels[others]) & set(known)

def features(spread, n=60, D=16):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(6).repeat_interleave(n)
    return torch.eye(D)[y] + spread*torch.randn(len(y), D, generator=g)/D**.5, y

def test_classes_that_are_clear():
    r = row(*features(.1), CLASSIFIERS['simpleshot_l2n'], 3, 8, .1, 20, 30, 0)
    assert r['accuracy'] == r['expected'] == 100 and r['covered'] == 100 and r['auroc'] > 99.9 and r['ece'] < 2 and r['lost'] < 25

def test_classes_that_are_the_same():
    "Every answer is a guess, and the support says so"
    h,y = features(1.)
    h = torch.randn(h.shape, generator=torch.Generator().manual_seed(1))
    r = row(h, y, CLASSIFIERS['simpleshot_l2n'], 4, 10, .1, 60, 40, 0)
    assert (r['accuracy'] == pytest.approx(25, abs=3) and r['expected'] == pytest.approx(27, abs=3) and r['covered'] >= 85
            and r['auroc'] == pytest.approx(50, abs=3) and r['lost'] == pytest.approx(10, abs=4))

def test_the_recipe_writes_a_record(csv_set, cache, tmp_path):
    common = dict(data=str(csv_set), cache=str(cache), out=str(tmp_path/'a'), results=str(tmp_path/'b'), ways='2', supports=3)
    recipe('trust')('convnet4.grdd_cifarfs', shots='2,4', **common)
    record = json.loads(next((tmp_path/'b').iterdir()).read_text())
    assert [(r['way'], r['shot']) for r in record['rows']] == [(2, 2), (2, 4)] and {'weights', 'command', 'commit', 'seed'} <= set(record)
    assert record == json.loads(next((tmp_path/'a').iterdir()).read_text())
    says(lambda: recipe('trust')('convnet4.grdd_cifarfs', shots='1', **common), '--shots is 1')
    for wrong,word in ((dict(ways='99'), '--ways is 99'), (dict(shots='9999'), '--shots is 9999'), (dict(unknown=2.), '--unknown is 2'),
                       (dict(classifiers='tim_adm'), 'tim_adm classifies photos together')):
        says(lambda wrong=wrong: recipe('trust')('convnet4.grdd_cifarfs', **common | wrong), word)
