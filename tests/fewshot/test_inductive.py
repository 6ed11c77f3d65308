"""Regressions against scikit-learn's and scipy's, and a support of unequal classes."""
import numpy as np
import pytest
from helpers import episodes, logits
from naive import cos, naive_logistic, unit
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression, RidgeClassifier


@pytest.mark.parametrize('C, K, D, normalize',
                         [(5, 1, 64, True), (5, 5, 64, True), (20, 5, 640, True), (5, 25, 64, True), (5, 5, 64, False)])
def test_logistic_regression_is_sklearns(C, K, D, normalize):
    s,s_y,q,_ = episodes(E=2, C=C, K=K, Q=3, D=D, noise=1.5)
    if not normalize: s,q = 4*s,4*q # of norm 40 and more
    for e,ours in enumerate(logits('logistic', s, s_y, q, normalize=normalize)):
        S,Q = (unit(s[e]), unit(q[e])) if normalize else (s[e], q[e])
        theirs = LogisticRegression(C=1, tol=1e-8, max_iter=10_000).fit(S, s_y[e]).decision_function(Q)
        assert np.abs((ours - ours.mean(1, keepdims=True)) - (theirs - theirs.mean(1, keepdims=True))).max() < 1e-3

def test_logistic_regression_minimises_its_loss():
    "By scipy, from the loss as it is written, with another C"
    s,s_y,q,_ = episodes(E=1, C=3, K=4, D=5)
    theirs,ours = naive_logistic(unit(s[0]), s_y[0], unit(q[0]), 7),logits('logistic', s, s_y, q, C=7.)[0]
    assert np.abs((ours - ours.mean(1, keepdims=True)) - (theirs - theirs.mean(1, keepdims=True))).max() < 2e-3

@pytest.mark.parametrize('K, D, noise', [(2, 8, 1.), (5, 64, 1.), (40, 6, .3)])
def test_lda_has_sklearns_covariance(K, D, noise):
    "The discriminant by the inverse of scikit-learn's shrunk covariance of the differences to the means; one photo a class: nearest mean"
    s,s_y,q,_ = episodes(E=2, C=4, K=K, Q=3, D=D, noise=noise)
    for e,ours in enumerate(logits('lda', s, s_y, q)):
        S,Q = unit(s[e]),unit(q[e])
        m = np.stack([S[s_y[e] == c].mean(0) for c in range(4)])
        inverse = np.linalg.inv(ledoit_wolf(S - m[s_y[e]], assume_centered=True)[0]*len(S)/(len(S) - 4))
        theirs = np.array([[-(x - c) @ inverse @ (x - c)/2 for c in m] for x in Q])
        scale = np.abs(theirs - theirs.mean(1, keepdims=True)).max()
        assert np.abs((ours - ours.mean(1, keepdims=True)) - (theirs - theirs.mean(1, keepdims=True))).max() < 1e-3*scale

def test_lda_of_one_photo_a_class_is_the_nearest_mean():
    s,s_y,q,_ = episodes(E=2, C=4, K=1, Q=3)
    assert np.allclose(logits('lda', s, s_y, q), logits('simpleshot_l2n', s, s_y, q), atol=1e-5)

@pytest.mark.parametrize('K', [1, 4])
def test_ridge_is_sklearns(K):
    s,s_y,q,_ = episodes(K=K)
    for e,ours in enumerate(logits('ridge', s, s_y, q, weight=.3)):
        assert np.allclose(ours, RidgeClassifier(alpha=.3, solver='cholesky').fit(unit(s[e]), s_y[e]).decision_function(unit(q[e])),
                           atol=1e-4)

def test_unequal_support_is_no_vote():
    "With 8, 1, 2 and 2 images a class the accuracy is that of the means, and no class wins by its number of images"
    g = np.random.default_rng(0)
    n,E,Q,D = [8, 1, 2, 2],200,15,32
    centres = g.normal(size=(E, 4, D))
    s_y,q_y = np.repeat(np.arange(4), n),np.repeat(np.arange(4), Q)
    s,q = (1.5 + centres[:, y] + g.normal(size=(E, len(y), D)) for y in (s_y, q_y))
    found = logits('cosine', s, np.tile(s_y, (E, 1)), q).argmax(-1)
    by_sum = np.stack([[[cos([x], s[e][s_y == c]).sum() for c in range(4)] for x in q[e]] for e in range(20)]).argmax(-1)
    right,right_by_sum = (found == q_y).mean(),(by_sum == q_y).mean()
    share = [(found == c).mean() for c in range(4)]
    assert right > .75 and right_by_sum < right - .2 and max(share) < .35
