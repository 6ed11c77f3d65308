"""Episodic methods: their equations in loops, easyfsl's classes on the same tensors, and what training by them does."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.schedule import *  # noqa: F401
from helpers import says
from torch import nn

from grdd_fastai.data.blocks import category_dls, episodic_dls, plain_dl
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.methods.episodic import (
    ANIL,
    FEAT,
    MAML,
    EpisodicMethod,
    MatchingNet,
    MetaBaseline,
    ProtoNet,
    RelationNet,
    episodic_learner,
)
from grdd_fastai.models.create import create_backbone

METHODS = dict(protonet=ProtoNet, matching=MatchingNet, relation=lambda net: RelationNet(net, px=16), meta_baseline=MetaBaseline, feat=FEAT,
               anil=lambda net: ANIL(net, n_way=3), maml=lambda net: MAML(net, n_way=3, steps=2, test_steps=2, lr=.3))
WORDS = dict(n_way=3, k_shot=2, n_query=4)

def made(name, seed=0):
    torch.manual_seed(seed)
    return METHODS[name](create_backbone('convnet4', 0, 16)).eval()

def episode(method, E=2, n_way=3, k_shot=2, n_query=4, seed=1):
    "Random features of episodes, sorted by class: support, its classes, queries and theirs"
    with torch.no_grad(): D = method(torch.zeros(1, 3, 16, 16)).shape[1]
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n_way)
    return (torch.randn(E, n_way*k_shot, D, generator=g), y.repeat_interleave(k_shot).repeat(E, 1),
            torch.randn(E, n_way*n_query, D, generator=g), y.repeat_interleave(n_query).repeat(E, 1))


# ---- the equations ----------------------------------------------------------------------------------------------------

def naive_protonet(m, s, y, q): return [-float((q - s[y == c].mean(0)).square().sum()) for c in range(3)]

def naive_matching(m, s, y, q):
    a = [math.exp(m.scale*float(F.cosine_similarity(q, x, dim=0))) for x in s]
    return [math.log(sum(w for w,c in zip(a, y) if c == k)/sum(a)) for k in range(3)]

def naive_meta_baseline(m, s, y, q): return [float(m.scale)*float(F.cosine_similarity(q, s[y == c].mean(0), dim=0)) for c in range(3)]

def naive_relation(m, s, y, q):
    maps = [torch.cat([s[y == c].sum(0).view(m.maps), q.view(m.maps)])[None] for c in range(3)]
    return [float(m.relation(x)) for x in maps]

def naive_feat(m, s, y, q):
    p = torch.stack([s[y == c].mean(0) for c in range(3)])
    adapted = []
    for i in range(3):
        scores = torch.stack([m.q.weight @ p[i] @ (m.k.weight @ p[j])/math.sqrt(p.shape[1]) for j in range(3)]).softmax(0)
        mixed = sum(scores[j]*(m.v.weight @ p[j]) for j in range(3))
        adapted.append(m.norm(p[i] + m.out(mixed)))
    return [-float((q - a).square().sum())/m.temperature for a in adapted]

def naive_anil(m, s, y, q):
    "Steps of torch's own SGD on torch's own cross-entropy"
    head = nn.Linear(s.shape[1], 3)
    head.load_state_dict(m.head.state_dict())
    opt = torch.optim.SGD(head.parameters(), lr=m.lr)
    for _ in range(m.steps):
        opt.zero_grad()
        F.cross_entropy(head(s), y).backward()
        opt.step()
    return head(q).tolist()

NAIVE = dict(protonet=naive_protonet, matching=naive_matching, relation=naive_relation, meta_baseline=naive_meta_baseline, feat=naive_feat,
             anil=naive_anil)

@pytest.mark.parametrize('name', NAIVE)
def test_logits_as_the_equations_say_in_loops(name):
    method = made(name)
    s,y,q,_ = episode(method)
    found = method.classify(s, y, q)
    want = torch.tensor([[NAIVE[name](method, s[e], y[e], x) for x in q[e]] for e in range(len(s))])
    assert found.shape == (2, 12, 3) and torch.allclose(found, want, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('name', METHODS)
def test_the_order_of_the_support_does_not_matter_and_that_of_the_classes_moves_the_logits(name):
    method = made(name)
    s,y,q,_ = episode(method)
    found = method.classify(s, y, q)
    p = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(method.classify(s[:, p], y[:, p], q), found, rtol=1e-4, atol=1e-4)
    if name not in ('anil', 'maml'): # whose head has a row for each position
        assert torch.allclose(method.classify(s, 2 - y, q), found.flip(-1), rtol=1e-4, atol=1e-4)

def test_maml_is_sgd_on_the_support_and_its_gradient_that_of_the_last_step():
    "torch's own SGD on a copy of the network, in training mode; nothing of the network changes when queries are classified"
    method = made('maml')
    s,y,q,q_y = episode(method)
    before = {k:v.clone() for k,v in method.state_dict().items()}
    found,logits = method.classify(s, y, q),method.train().logits(s, y, q)
    assert all(torch.equal(v, before[k]) for k,v in method.eval().state_dict().items() if 'running' not in k and 'num_batches' not in k)
    assert torch.allclose(found, logits, rtol=1e-4, atol=1e-4)
    method.loss(logits, q_y).backward()
    total = {}
    assert method.steps == method.test_steps
    for e in range(2):
        net = nn.Sequential(copy.deepcopy(method.backbone), copy.deepcopy(method.head)).train()
        opt = torch.optim.SGD(net.parameters(), lr=method.lr)
        for _ in range(method.test_steps):
            opt.zero_grad()
            F.cross_entropy(net(s[e].view(-1, 3, 16, 16)), y[e]).backward()
            opt.step()
        opt.zero_grad()
        z = net(q[e].view(-1, 3, 16, 16))
        assert torch.allclose(z, found[e], rtol=1e-3, atol=1e-3)
        F.cross_entropy(z, q_y[e]).backward()
        for k,p in net.named_parameters(): total[k] = total.get(k, 0.) + p.grad/2
    for k,p in method.named_parameters():
        want = total[k.replace('backbone.', '0.').replace('head.', '1.')]
        assert torch.allclose(p.grad, want, rtol=1e-2, atol=2e-4*want.abs().max() + 1e-6), k
    method = made('maml')
    method.classify(s, y, q)
    assert all(torch.equal(v, before[k]) for k,v in method.state_dict().items()) # nor its running statistics

def test_against_easyfsl_on_the_same_tensors():
    methods = pytest.importorskip('easyfsl.methods', reason='easyfsl is not installed')
    attention = pytest.importorskip('easyfsl.modules.attention_modules')
    for name in ('protonet', 'relation', 'feat'):
        mine = made(name)
        # for one shot, because easyfsl's RelationNet compares with the mean of a class, and the paper with the sum
        s,y,q,_ = episode(mine, E=1, k_shot=1 if name == 'relation' else 2)
        D,shape = s.shape[-1],getattr(mine, 'maps', None)
        maps = (lambda h, shape=shape: h.unflatten(-1, shape)) if shape else nn.Identity()
        if name == 'protonet': other = methods.PrototypicalNetworks(nn.Identity())
        elif name == 'relation':
            other = methods.RelationNetworks(nn.Identity(), feature_dimension=shape[0], relation_module=mine.relation)
        else:
            module = attention.MultiHeadAttention(1, D, D, D).eval()
            for theirs,ours in dict(w_qs='q', w_ks='k', w_vs='v', fc='out', layer_norm='norm').items():
                getattr(module, theirs).load_state_dict(getattr(mine, ours).state_dict())
            other = methods.FEAT(nn.Identity(), attention_module=module)
        other.eval().process_support_set(maps(s[0]), y[0])
        with torch.no_grad(): theirs = other(maps(q[0]))
        ours = mine.classify(s, y, q)[0]
        if name == 'feat': ours = ours*mine.temperature
        if name != 'relation': ours = -(-ours).clamp_min(0).sqrt() # easyfsl takes the distance, and not its square
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4), name

def test_relation_is_trained_by_the_squared_error():
    method = made('relation')
    logits,y = torch.tensor([[[.9, .2, .1], [.3, .3, .3]]]),torch.tensor([[0, 2]])
    assert float(method.loss(logits, y)) == pytest.approx(((.01 + .04 + .01) + (.09 + .09 + .49))/2)


# ---- training ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', METHODS)
def test_training_raises_the_accuracy_on_the_validation_classes(name, data, faint_data):
    found = data if name == 'relation' else faint_data # a relation network learns slowly; the others know distinct colours from the start
    dls = episodic_dls(found, **WORDS, n_episodes=60)
    n,epochs = (40, 4) if name == 'maml' else (300, 2) # it trains a network for each
    learn = episodic_learner(dls, METHODS[name], valid=dict(n_query=4, n_episodes=n), amp=False)
    with learn.no_bar(), learn.no_logging():
        before = learn.validate()[0]
        learn.fit_one_cycle(epochs, 1e-2)
    h,y = embed(learn.model, plain_dl(found, 'val'))
    after = evaluate(h, y, n_way=3, k_shot=2, n_query=4, n_episodes=n, classifier=learn.model.classify)
    assert after.accuracy == pytest.approx(learn.keep_best.best, abs=1e-6) and learn.keep_best.best > before + 1

def test_a_step_moves_what_the_method_has_beside_the_backbone(data):
    dls = episodic_dls(data, **WORDS, n_episodes=3)
    for name in ('relation', 'meta_baseline', 'feat', 'anil'):
        learn = episodic_learner(dls, METHODS[name], valid=dict(n_query=4, n_episodes=20), amp=False, keep_best=False)
        before = {k:p.detach().clone() for k,p in learn.model.named_parameters()}
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
        for k,p in learn.model.named_parameters():
            if 'head' not in k or name == 'anil': assert not torch.equal(p.detach().cpu(), before[k].cpu()), k

def test_a_method_of_ones_own_is_one_function(data):
    class Nearest(EpisodicMethod):
        def logits(self, support, support_y, query):
            return -torch.stack([torch.cdist(query, support[:, support_y[0] == c]).amin(-1) for c in range(3)], -1)
    learn = episodic_learner(episodic_dls(data, **WORDS, n_episodes=5), Nearest, valid=dict(n_query=4, n_episodes=20), amp=False)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert np.isfinite(learn.recorder.losses[-1])

def test_what_cannot_be_is_a_sentence(data):
    says(lambda: episodic_learner(category_dls(data), ProtoNet), 'episodic_dls')
    says(lambda: episodic_learner(episodic_dls(data, **WORDS), nn.Identity()), 'EpisodicMethod')
    says(lambda: episodic_learner(episodic_dls(data, **WORDS), ProtoNet, ema_decay=.9), 'ema_decay')
