"""Test what a classifier says of its support photos that are held out, against scipy, against known distributions and by invariances."""
import numpy as np
import pytest
import torch
from helpers import says
from scipy.stats import binomtest

from grdd_fastai.fewshot.classifiers import CLASSIFIERS
from grdd_fastai.photos import trust
from grdd_fastai.photos.trust import HeldOut, choose_classifier, expected_accuracy, hold_out, softmax_scale, unknown_below


def support(sizes, D=8, spread=1., seed=0):
    "Features (N, D) of classes of these sizes, around means of length one in random directions, and their classes"
    g = torch.Generator().manual_seed(seed)
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    means = torch.nn.functional.normalize(torch.randn(len(sizes), D, generator=g), dim=1)
    return means[y] + spread*torch.randn(len(y), D, generator=g)/D**.5, y

def held(right=(), y=None, logits=None, similarity=()):
    y = np.zeros(len(right), int) if y is None else y
    return HeldOut(np.arange(len(y)), y, logits, np.asarray(right, float), np.asarray(similarity, float))


@pytest.mark.parametrize('sizes', [(3, 3, 3), (2, 5, 1, 4), (1, 2), (7, 120, 2), (450, 60, 3)])
def test_a_held_out_photo_is_never_in_its_support(sizes):
    "The features are the photos' numbers, so that the classifier sees which they are; each class keeps its proportion and a photo"
    h,y = torch.arange(float(sum(sizes))).unsqueeze(1) + 1,support(sizes)[1]
    times = np.zeros(len(y), int)
    def classifier(s, s_y, q):
        for stay,labels,out in zip(s[..., 0].long() - 1, s_y, q[..., 0].long() - 1):
            assert sorted([*stay.tolist(), *out.tolist()]) == list(range(len(y))) and torch.equal(y[stay], labels)
            left = np.bincount(y[out], minlength=len(sizes))
            assert all(n == (0 if size == 1 else 1) if size <= 50 else n in (size//50, size//50 + 1)
                       for n,size in zip(left, sizes, strict=True))
            times[out] += 1
        return torch.zeros(*q.shape[:2], len(sizes))
    found = hold_out(classifier, h, y)
    several = np.array(sizes)[y] > 1
    least = 5 if len(y) <= 500 else 1
    assert found.rows.tolist() == np.flatnonzero(several).tolist() and (times[several] >= least).all() and not times[~several].any()
    assert np.array_equal(found.y, y[found.rows]) and found.logits.shape == (several.sum(), len(sizes))

@pytest.mark.parametrize('name', ['simpleshot_l2n', 'lda', 'ridge'])
def test_held_out_logits_by_a_loop(name):
    "With two photos of each of two classes, there are two supports that a photo can have"
    h,y = support((2, 2))
    found = hold_out(CLASSIFIERS[name], h, y)
    for i in range(4):
        each = []
        for out in [j for j in range(4) if y[j] != y[i]]: # the photo of the other class that is held out with this one
            stay = [j for j in range(4) if j not in (i, out)]
            each.append(CLASSIFIERS[name](h[stay][None], y[stay][None], h[i][None, None])[0, 0])
        first,second = each
        other = 1 - int(y[i])
        w = float((found.logits[i] - second)[other]/(first - second)[other]) # how often of five times it was the first of them
        assert 5*w == pytest.approx(round(5*w), abs=1e-2) and 0 <= round(5*w) <= 5
        assert torch.allclose(found.logits[i], w*first + (1 - w)*second, atol=1e-4)

def test_one_photo_of_each_class_cannot_be_held_out():
    says(lambda: hold_out(CLASSIFIERS['cosine'], *support((1, 1, 1))), 'each class has one photo', 'add photos')

@pytest.mark.parametrize('k, n', [(0, 10), (7, 10), (25, 25), (40, 160)])
def test_the_interval_is_wilsons(k, n, monkeypatch):
    monkeypatch.setattr(trust, 'EVIDENCE', 1.)
    monkeypatch.setattr(trust, 'LEARNING', 0.)
    for confidence in (0.9, 0.95):
        low,high = binomtest(k, n).proportion_ci(confidence, 'wilson')
        assert expected_accuracy(held([1]*k + [0]*(n - k)), confidence) == pytest.approx((k/n, low, high), abs=1e-9)

def test_each_class_counts_the_same():
    "A class of 2 photos, both wrong, and one of 98, all right: about half of the photos will be right, and little is known"
    y = np.array([0]*2 + [1]*98)
    accuracy,low,high = expected_accuracy(held([0]*2 + [1]*98, y))
    assert 0.5 < accuracy < 0.6 and low < 0.3 and high > 0.75

def test_the_scale_that_made_the_labels_is_found():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6000, 4, generator=g)
    y = torch.multinomial((2*logits).softmax(1), 1, generator=g)[:, 0].numpy()
    for unit in (1., 1000., 1e-3): # whatever the unit of the logits
        assert softmax_scale(held([0]*6000, y, logits*unit))*unit == pytest.approx(2, rel=.06)

def test_few_photos_that_are_all_right_do_not_make_certain():
    y = np.array([0, 1]*3)
    logits = torch.eye(2)[y]
    assert 0.5 < (softmax_scale(held([1]*6, y, logits))*logits).softmax(1).amax() < 0.999
    assert np.isfinite(softmax_scale(held([1]*6, y, torch.zeros(6, 2))))

@pytest.mark.parametrize('n, rate', [(19, .05), (30, .1), (25, .05), (12, .3)])
def test_the_threshold_loses_the_share_that_it_is_asked_to(n, rate):
    "On average over supports: similarities are uniform, so that a threshold t loses the share t; a mean of uniform order statistics"
    rng = np.random.default_rng(0)
    lost = [unknown_below(held([0]*n, similarity=rng.random(n)), rate) for _ in range(4000)]
    assert np.mean(lost) == pytest.approx(rate, abs=4*np.std(lost)/4000**.5)

def test_too_few_photos_for_a_rate():
    says(lambda: unknown_below(held([0]*18, similarity=[1.]*18), .05), 'needs 19 photos', 'there are 18', 'unknown=0.06')
    assert unknown_below(held([0]*19, similarity=range(19)), .05) == 0

def test_another_classifier_is_chosen_only_if_it_is_clearly_better():
    h,y = support((10, 10, 10), spread=.5)
    def chance(s, s_y, q): return torch.zeros(*q.shape[:2], 3)
    good = CLASSIFIERS['simpleshot_l2n']
    assert choose_classifier(dict(chance=chance, good=good), h, y) == 'good'
    assert choose_classifier(dict(good=good, chance=chance), h, y) == choose_classifier(dict(good=good, same=good), h, y) == 'good'
