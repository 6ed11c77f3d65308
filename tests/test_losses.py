"""Equations 10-15 against naive loops, hand values and invariances."""
import math

import numpy as np
import pytest
import torch
from naive import naive_cross_entropy, naive_kl, naive_R, naive_sigma

from grdd_fastai.losses import EpisodicLoss, class_relatedness, kl_relatedness, log_relatedness, regularizer, relatedness

E,WAY,SHOT,QUERY,D = 2,3,2,4,5

@pytest.fixture
def feats():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(E, WAY*n, D, generator=g) for n in (SHOT, QUERY, SHOT, QUERY)]


def test_relatedness_is_the_cosine_of_every_pair(feats):
    s,q = feats[:2]
    assert np.allclose(relatedness(s, q), naive_R(s, q), atol=1e-6)

def test_centred_relatedness_ignores_a_common_shift(feats):
    s,q = feats[:2]
    assert torch.allclose(relatedness(s, q, center=True), relatedness(s + 7., q + 7., center=True), atol=1e-5)
    assert not torch.allclose(relatedness(s, q), relatedness(s + 7., q + 7.), atol=1e-2)

@pytest.mark.parametrize('T', [0.1, 1., 4.])
@pytest.mark.parametrize('decouple', [True, False])
@pytest.mark.parametrize('reverse', [False, True])
def test_kl_is_the_naive_loop(feats, T, decouple, reverse):
    R_e,R_g = relatedness(*feats[:2]),relatedness(*feats[2:])
    want = naive_kl(naive_R(*feats[:2]), naive_R(*feats[2:]), T, decouple, reverse)
    assert kl_relatedness(R_e, R_g, T, decouple, reverse).item() == pytest.approx(want, rel=1e-4)

def test_kl_mean_is_the_sum_over_the_groups(feats):
    R_e,R_g = relatedness(*feats[:2]),relatedness(*feats[2:])
    assert kl_relatedness(R_e, R_g, 4., reduction='mean').item()*WAY*SHOT == pytest.approx(kl_relatedness(R_e, R_g, 4.).item(), rel=1e-5)

def test_kl_by_hand():
    "One support, two queries: w_g = (3/4, 1/4), w_e = (1/2, 1/2)"
    R_g,R_e = torch.tensor([[[math.log(3.), 0.]]]),torch.zeros(1, 1, 2)
    assert kl_relatedness(R_e, R_g, T=1.).item() == pytest.approx(.75*math.log(1.5) + .25*math.log(.5), rel=1e-5)

def test_kl_of_equals_is_zero_and_of_others_positive(feats):
    R_e,R_g = relatedness(*feats[:2]),relatedness(*feats[2:])
    assert kl_relatedness(R_g, R_g, 4.).item() == pytest.approx(0, abs=1e-7) and kl_relatedness(R_e, R_g, 4.).item() > 0

def test_groups_sum_to_one(feats):
    R = relatedness(*feats[:2])
    assert torch.allclose(log_relatedness(R, 4.).exp().sum(-1), torch.ones(E, WAY*SHOT))
    assert log_relatedness(R, 4., decouple=False).shape == (E, 1, WAY*SHOT*WAY*QUERY)

def test_class_relatedness_is_the_naive_sum(feats):
    s,q = feats[:2]
    y = torch.tensor([[0,0,1,1,2,2], [2,1,0,0,1,2]])
    sigma = class_relatedness(relatedness(s, q), y, WAY)
    assert np.allclose(sigma, naive_sigma(naive_R(s, q), y, WAY), atol=1e-5)
    assert torch.allclose(class_relatedness(relatedness(s, q), y, WAY, mean=True), sigma/SHOT)

def test_regularizer_is_the_naive_cross_entropy():
    sigma,y = torch.tensor([[[.5, -.2], [.1, .9]]]),torch.tensor([[0, 0]])
    assert regularizer(sigma, y, scale=10.).item() == pytest.approx(naive_cross_entropy(sigma[0].tolist(), [0, 0]), rel=1e-5)

def test_episodic_loss_reads_the_layout_class_by_class():
    "Features (E * way * (shot+query), D) that say class and role: each image goes to its place"
    loss = EpisodicLoss(WAY, SHOT, QUERY)
    tags = torch.tensor([[c, i < SHOT] for _ in range(E) for c in range(WAY) for i in range(SHOT+QUERY)]).float()
    support,query = loss.split(tags)
    assert support[..., 1].all() and not query[..., 1].any()
    assert torch.equal(support[..., 0].long(), loss.split(loss.classes(tags))[0])
    assert torch.equal(query[..., 0].long(), loss.split(loss.classes(tags))[1])

def test_episodic_loss_does_not_depend_on_the_order_of_classes(feats):
    loss,h = EpisodicLoss(WAY, SHOT, QUERY),torch.randn(WAY, SHOT+QUERY, D, generator=torch.Generator().manual_seed(1))
    assert loss(h.flatten(0, 1)).item() == pytest.approx(loss(h[[2,0,1]].flatten(0, 1)).item(), rel=1e-5)

def test_everything_is_float32_under_autocast_and_finite_for_half_features(feats):
    s,q,s_g,q_g = (f.bfloat16() for f in feats)
    with torch.autocast('cpu', torch.bfloat16):
        assert (s @ q.transpose(-1, -2)).dtype == torch.bfloat16 # what would happen without care
        R_e,R_g = relatedness(s, q),relatedness(s_g, q_g)
        y = torch.arange(WAY).repeat_interleave(SHOT).expand(E, -1)
        sigma = class_relatedness(R_e, y, WAY)
        L_rt = regularizer(sigma, torch.zeros(E, WAY*QUERY, dtype=torch.long))
        parts = R_e,log_relatedness(R_e, 4.),kl_relatedness(R_e, R_g, 4.),sigma,L_rt
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in parts)
    exact = relatedness(*(f.bfloat16().double() for f in feats[:2]))
    assert exact.dtype == torch.float64 and torch.allclose(R_e.double(), exact, atol=1e-5)

def test_gradients_reach_the_student():
    s,q = torch.randn(1, 3, D, requires_grad=True),torch.randn(1, 6, D)
    kl_relatedness(relatedness(s, q), relatedness(torch.randn(1, 3, D), q), T=.1).backward()
    assert s.grad.abs().sum() > 0
