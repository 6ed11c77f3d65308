"""Classifiers that look at the queries, against the official formulas on real features."""
import inspect

import numpy as np
import pytest
import timm
import torch
from helpers import SLOW, episodes, logits
from naive import PLAIN, official_tim

from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.data.episodes import sample_episodes
from grdd_fastai.fewshot.classifiers import CLASSIFIERS
from grdd_fastai.fewshot.embed import embed


@pytest.mark.parametrize('name', SLOW)
def test_nor_in_a_thousand_steps(name):
    "At the official settings of gradient descent, which are the defaults"
    defaults = {k:p.default for k,p in inspect.signature(CLASSIFIERS[name].__wrapped__).parameters.items()}
    assert (defaults['lr'], defaults['steps'], defaults['scale']) == (1e-4, 1000, 15.)
    s,s_y,q,_ = episodes(E=3, C=3, K=1, Q=3)
    together = logits(name, s, s_y, q)
    for e in range(3): assert np.allclose(logits(name, s[e:e+1], s_y[e:e+1], q[e:e+1])[0], together[e], atol=1e-5)

def test_a_plan_has_the_asked_for_sums():
    plan = logits('pt_map', *episodes(K=1, Q=15)[:3])
    assert np.allclose(np.exp(plan).sum(2), 1, atol=1e-4) and np.allclose(np.exp(plan).sum(1), 15, atol=1e-3)


# ---- real features ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def real_episodes(real):
    "Features of the shipped weights: 5-way episodes of validation images, 1-shot and 5-shot"
    net = timm.create_model('convnet4.grdd_cifarfs', pretrained=True, num_classes=0)
    h,y = embed(net, plain_dl(real, 'val'))
    found = {}
    for K in (1, 5):
        support,query = (torch.as_tensor(rows).flatten(1) for rows in next(sample_episodes(y, 5, K, 15, 12, seed=3)))
        found[K] = h[support].double().numpy(),np.repeat(np.arange(5)[None], 12, 0).repeat(K, 1),h[query].double().numpy()
    return found

@pytest.mark.parametrize('K', [1, 5])
@pytest.mark.parametrize('name', sorted(k for k,f in CLASSIFIERS.items() if f.transductive and k not in SLOW))
def test_transductive_methods_are_the_official_formulas_on_real_features(real_episodes, name, K):
    s,s_y,q = real_episodes[K]
    ours,same = logits(name, s, s_y, q),[]
    for e in range(len(s) if name in ('bd_cspn', 'laplacian_shot', 'soft_kmeans') else 3):
        theirs = PLAIN[name](s[e], s_y[e], q[e])
        same.append((ours[e].argmax(-1) == theirs.argmax(-1)).mean())
        if name != 'pt_map': assert np.allclose(ours[e], theirs, atol=5e-3, rtol=1e-3)
        else: assert np.allclose(np.exp(ours[e]), np.exp(theirs), atol=5e-3)
    assert np.mean(same) > .995

@pytest.mark.parametrize('K', [1, 5])
@pytest.mark.parametrize('name, alpha', [('tim_gd', None), ('alpha_tim', {1:2., 5:7.})])
def test_gradient_descent_at_the_official_settings_on_real_features(real_episodes, name, alpha, K):
    "A thousand steps of torch's own Adam and autograd on the loss as the authors write it"
    s,s_y,q = (torch.as_tensor(x[:3]) for x in real_episodes[K])
    ours = CLASSIFIERS[name](s, s_y, q)
    for e in range(3):
        theirs = official_tim(s[e], s_y[e], q[e], alpha and alpha[K])
        assert torch.allclose(ours[e], theirs, atol=1e-3) and (ours[e].argmax(1) == theirs.argmax(1)).all()
