"""Every classifier against a slow, plain restatement of its paper, and against other libraries where they have it."""
import inspect
from functools import partial

import easyfsl.methods
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression, RidgeClassifier

from grdd_fastai import inference, transductive
from grdd_fastai.errors import UserError
from grdd_fastai.evaluate import evaluate, sample_episodes
from grdd_fastai.inference import CLASSIFIERS, get_classifier

SLOW = dict(tim_gd=dict(steps=60, lr=1e-3), alpha_tim=dict(steps=60, lr=1e-3)) # fewer steps, longer ones

def episodes(E=3, C=4, K=2, Q=5, D=6, seed=0, noise=.8):
    "Positive features of classes that overlap, support in no order; support_y, query_y"
    g = np.random.default_rng(seed)
    centres = g.normal(size=(E, C, D))
    def images(n):
        y = np.stack([g.permutation(np.repeat(np.arange(C), n)) for _ in range(E)])
        return np.abs(np.take_along_axis(centres, y[..., None], 1) + noise*g.normal(size=(E, C*n, D)) + 1),y
    (s,s_y),(q,q_y) = images(K),images(Q)
    return s,s_y,q,q_y

def logits(name, s, s_y, q, **settings):
    t = lambda a: torch.as_tensor(a).float() if a.dtype.kind == 'f' else torch.as_tensor(a)
    return CLASSIFIERS[name](t(s), t(s_y), t(q), **settings).numpy()

def unit(x): return x / np.linalg.norm(x, axis=-1, keepdims=True)
def means(s, y): return np.stack([s[y == c].mean(0) for c in range(y.max()+1)])
def sq(a, b): return np.array([[((x - z)**2).sum() for z in b] for x in a])
def cos(a, b): return np.array([[x @ z / np.linalg.norm(x) / np.linalg.norm(z) for z in b] for x in a])


# ---- one episode each, float64, from the papers ------------------------------------------------------------------------

def cosine(s, y, q): return np.array([[cos([x], s[y == c]).sum() for c in range(y.max()+1)] for x in q])
def centroid(s, y, q): return -sq(q, means(s, y))
def centroid_cosine(s, y, q): return cos(q, means(s, y))
def simpleshot(s, y, q, mean=0.): return -sq(unit(q - mean), means(unit(s - mean), y))
def neighbour(s, y, q): return np.array([[max(cos([x], s[y == c])[0]) for c in range(y.max()+1)] for x in q])

def rectified(s, y, q, scale):
    p,q = means(s, y),q + s.mean(0) - q.mean(0)
    new = []
    for c in range(len(p)):
        members = [x for x,k in zip(s, y) if k == c] + [x for x in q if cos([x], p)[0].argmax() == c]
        w = softmax([scale*cos([x], p[c:c+1])[0, 0] for x in members])
        new.append(sum(a*x for a,x in zip(w, members)))
    return np.array(new),q
def bd_cspn(s, y, q, scale=10.):
    p,q = rectified(s, y, q, scale)
    return cos(q, p)

def laplacian_shot(s, y, q, weight=.7, n_neighbours=3, steps=20):
    p,q = rectified(unit(s), y, unit(q), 10.)
    a,W = sq(q, p),np.zeros((len(q), len(q)))
    for i,row in enumerate(sq(q, q)): W[i, [j for j in row.argsort() if j != i][:n_neighbours]] = 1
    z = softmax(-a, 1)
    for _ in range(steps): z = softmax(weight*W @ z - a, 1)
    return np.log(z)

def pt_map(s, y, q, power=.5, scale=10., lr=.2, steps=20):
    z = unit((np.concatenate([s, q]) + 1e-6)**power)
    z = unit(z - z.mean(0))
    z_s,z_q = z[:len(s)],z[len(s):]
    p,C = means(z_s, y),y.max()+1
    for step in range(steps + 1):
        M = np.exp(-scale*sq(z_q, p))
        for _ in range(5000): # rows to 1, columns to NQ/C
            M /= M.sum(1, keepdims=True)
            M *= len(q)/C / M.sum(0)
        M /= M.sum(1, keepdims=True)
        if step == steps: return np.log(M)
        of = np.stack([(z_s[y == c].sum(0) + M[:, c] @ z_q) / ((y == c).sum() + M[:, c].sum()) for c in range(C)])
        p = p + lr*(of - p)

def soft_kmeans(s, y, q, scale=15., steps=10):
    s,q = unit(s),unit(q)
    p = means(s, y)
    for _ in range(steps):
        z = softmax(-scale/2*sq(q, p), 1)
        p = np.stack([(s[y == c].sum(0) + z[:, c] @ q) / ((y == c).sum() + z[:, c].sum()) for c in range(len(p))])
    return -scale/2*sq(q, p)

def tim_adm(s, y, q, tau=15., lam=.1, a=1., b=.1, steps=150):
    s,q = unit(s),unit(q)
    W,C = means(s, y),y.max()+1
    for _ in range(steps):
        P_s,P_q = softmax(-tau/2*sq(s, W), 1),softmax(-tau/2*sq(q, W), 1)
        Q = P_q**(1 + b)
        Q = Q / Q.sum(0)**(a/(a + 1))
        Q = Q / Q.sum(1, keepdims=True)
        new = []
        for k in range(C):
            S = sum((y[i] == k)*s[i] + P_s[i, k]*(W[k] - s[i]) for i in range(len(s)))
            U = sum(Q[i, k]*q[i] + P_q[i, k]*(W[k] - q[i]) for i in range(len(q)))
            new.append((lam/(1 + b)*S + len(s)/len(q)*U) / (lam/(1 + b)*(y == k).sum() + len(s)/len(q)*Q[:, k].sum()))
        W = np.array(new)
    return -tau/2*sq(q, W)

def descent(s, y, q, loss, lr, steps, tau=15.):
    "Adam written out, with derivatives by differences"
    s,q = unit(s),unit(q)
    W = means(s, y)
    m,v,f = np.zeros_like(W),np.zeros_like(W),lambda W: loss(-tau/2*sq(s, W), y, -tau/2*sq(q, W))
    for t in range(1, steps + 1):
        g = np.zeros_like(W)
        for i in np.ndindex(*W.shape):
            d = np.zeros_like(W)
            d[i] = 1e-5
            g[i] = (f(W + d) - f(W - d)) / 2e-5
        m,v = .9*m + .1*g,.999*v + .001*g*g
        W = W - lr * m/(1 - .9**t) / (np.sqrt(v/(1 - .999**t)) + 1e-8)
    return -tau/2*sq(q, W)
def cross_entropy(rows, y): return -np.mean([log_softmax(row)[k] for row,k in zip(rows, y)])
def shannon(p): return -sum(x*np.log(x) for x in p)
def tim_gd(s, y, q, steps=60, lr=1e-3):
    def loss(l_s, y, l_q):
        P = softmax(l_q, 1)
        return .1*cross_entropy(l_s, y) - (shannon(P.mean(0)) - .1*np.mean([shannon(p) for p in P]))
    return descent(s, y, q, loss, lr, steps)
def alpha_tim(s, y, q, steps=60, lr=1e-3, alpha=7.):
    def H(p): return (1 - sum(x**alpha for x in p)) / (alpha - 1)
    def loss(l_s, y, l_q):
        P = softmax(l_q, 1)
        return cross_entropy(l_s, y) - (H(P.mean(0)) - np.mean([H(p) for p in P]))
    return descent(s, y, q, loss, lr, steps)

PLAIN = dict(cosine=cosine, centroid=centroid, centroid_cosine=centroid_cosine, simpleshot=simpleshot, neighbour=neighbour, bd_cspn=bd_cspn, laplacian_shot=laplacian_shot, pt_map=pt_map,
             soft_kmeans=soft_kmeans, tim_adm=tim_adm, tim_gd=tim_gd, alpha_tim=alpha_tim)

@pytest.mark.parametrize('K', [1, 3])
@pytest.mark.parametrize('name', PLAIN)
def test_the_plain_restatement(name, K):
    s,s_y,q,_ = episodes(E=2 if name in SLOW else 3, K=K, Q=4)
    ours,seen = logits(name, s, s_y, q, **SLOW.get(name, {})),np.exp if name == 'pt_map' else np.asarray # a plan; its logs of nothing may drift
    for e in range(len(s)): assert np.allclose(seen(ours[e]), seen(PLAIN[name](s[e], s_y[e], q[e])), atol=2e-3, rtol=1e-3), e

@pytest.mark.parametrize('name, settings', [('simpleshot', dict(mean=np.full(6, .7, np.float32))), ('laplacian_shot', dict(weight=1.5, n_neighbours=2))])
def test_settings(name, settings):
    s,s_y,q,_ = episodes()
    given = {k:torch.as_tensor(v) if isinstance(v, np.ndarray) else v for k,v in settings.items()}
    for e,ours in enumerate(logits(name, s, s_y, q, **given)): assert np.allclose(ours, PLAIN[name](s[e], s_y[e], q[e], **settings), atol=1e-4)

def test_every_classifier_has_its_restatement(): assert set(CLASSIFIERS) == {*PLAIN, 'ridge', 'logistic'}


# ---- scikit-learn -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('C, K, D, normalize', [(5, 1, 64, True), (5, 5, 64, True), (20, 5, 640, True), (5, 25, 64, True), (5, 5, 64, False)])
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
    S,y,Q = unit(s[0]),s_y[0],unit(q[0])
    def loss(w):
        W,b = w[:15].reshape(3, 5),w[15:]
        return (W**2).sum()/2 + 7*sum(-log_softmax(W@x + b)[k] for x,k in zip(S, y))
    w = minimize(loss, np.zeros(18), method='BFGS', options=dict(gtol=1e-7)).x
    theirs = Q @ w[:15].reshape(3, 5).T + w[15:]
    ours = logits('logistic', s, s_y, q, C=7.)[0]
    assert np.abs((ours - ours.mean(1, keepdims=True)) - (theirs - theirs.mean(1, keepdims=True))).max() < 2e-3

@pytest.mark.parametrize('K', [1, 4])
def test_ridge_is_sklearns(K):
    s,s_y,q,_ = episodes(K=K)
    for e,ours in enumerate(logits('ridge', s, s_y, q, weight=.3)):
        assert np.allclose(ours, RidgeClassifier(alpha=.3, solver='cholesky').fit(unit(s[e]), s_y[e]).decision_function(unit(q[e])), atol=1e-4)


# ---- easyfsl ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('method, K, n, name, settings', [
    ('SimpleShot', 1, 1000, 'simpleshot', {}), ('SimpleShot', 5, 300, 'centroid_cosine', {}), # of several shots easyfsl takes the cosine, the paper distances
    ('PrototypicalNetworks', 5, 300, 'centroid', {}), ('BDCSPN', 1, 1000, 'bd_cspn', dict(scale=1., shift=False)), # it leaves the queries where they were
    ('LaplacianShot', 1, 1000, 'laplacian_shot', dict(scale=1., shift=False, n_neighbours=2)), # its k counts the query itself
    ('PTMAP', 1, 25, 'pt_map', dict(steps=10, normalize=False))])
def test_easyfsls_accuracy(method, K, n, name, settings):
    "On the same episodes of the same unit features, with easyfsl's own definitions, within 0.1 points"
    theirs = getattr(easyfsl.methods, method)(feature_normalization=2)
    g = torch.Generator().manual_seed(0)
    y = torch.arange(8).repeat_interleave(40)
    h = torch.nn.functional.normalize((torch.randn(8, 32, generator=g)[y] + 2*torch.randn(len(y), 32, generator=g) + 1).relu(), dim=1)
    accs,(s_y,q_y) = [],(torch.arange(5).repeat_interleave(k) for k in (K, 15))
    with torch.no_grad():
        for support,query in sample_episodes(y, 5, K, 15, n):
            for s,q in zip(torch.as_tensor(support).flatten(1), torch.as_tensor(query).flatten(1)):
                theirs.process_support_set(h[s], s_y)
                accs.append((theirs(h[q]).argmax(1) == q_y).float().mean().item()*100)
    ours = evaluate(h, y, 5, K, 15, n, classifier=partial(CLASSIFIERS[name], **settings))
    assert ours.accuracy == pytest.approx(np.mean(accs), abs=.1) and 25 < ours.accuracy < 95


# ---- what holds for all -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', CLASSIFIERS)
def test_episodes_do_not_see_each_other(name):
    "Alone or in a crowd, however large the chunk"
    s,s_y,q,_ = episodes(E=5, noise=1.5)
    together = logits(name, s, s_y, q, **SLOW.get(name, {}))
    for e in range(5): assert np.allclose(logits(name, s[e:e+1], s_y[e:e+1], q[e:e+1], **SLOW.get(name, {}))[0], together[e], atol=1e-5)

@pytest.mark.parametrize('name', SLOW)
def test_nor_in_a_thousand_steps(name):
    "At the official settings of gradient descent, which are the defaults"
    defaults = {k:p.default for k,p in inspect.signature(CLASSIFIERS[name].__wrapped__).parameters.items()}
    assert (defaults['lr'], defaults['steps'], defaults['scale']) == (1e-4, 1000, 15.)
    s,s_y,q,_ = episodes(E=3, C=3, K=1, Q=3)
    together = logits(name, s, s_y, q)
    for e in range(3): assert np.allclose(logits(name, s[e:e+1], s_y[e:e+1], q[e:e+1])[0], together[e], atol=1e-5)

@pytest.mark.parametrize('name', CLASSIFIERS)
def test_the_order_of_images_and_classes_changes_nothing(name):
    s,s_y,q,_ = episodes(E=2)
    ours = logits(name, s, s_y, q, **SLOW.get(name, {}))
    g = np.random.default_rng(1)
    a,b,c = g.permutation(s.shape[1]),g.permutation(q.shape[1]),g.permutation(4)
    other = logits(name, s[:, a], c[s_y[:, a]], q[:, b], **SLOW.get(name, {}))
    assert np.allclose(other[..., c], ours[:, b], atol=1e-4)

@pytest.mark.parametrize('name', CLASSIFIERS)
def test_easy_episodes_are_solved_and_only_transductive_ones_look_at_other_queries(name):
    s,s_y,q,q_y = episodes(K=1, Q=15, D=32, noise=.3)
    settings = SLOW.get(name, {})
    assert (logits(name, s, s_y, q, **settings).argmax(-1) == q_y).mean() > .95
    few = logits(name, s, s_y, q[:, :20], **settings)
    assert np.allclose(few, logits(name, s, s_y, q, **settings)[:, :20], atol=1e-5) != CLASSIFIERS[name].transductive

@pytest.mark.parametrize('name', CLASSIFIERS)
def test_inputs_are_left_alone_and_a_second_call_is_the_first(name):
    s,s_y,q,_ = (torch.as_tensor(a) for a in episodes())
    s,q = s.float(),q.float()
    before = s.clone(),q.clone()
    a,b = (CLASSIFIERS[name](s, s_y, q, **SLOW.get(name, {})) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(s, before[0]) and torch.equal(q, before[1]) and a.dtype == torch.float32 and not a.requires_grad

@pytest.mark.parametrize('name', CLASSIFIERS)
def test_bad_input_gets_a_sentence(name):
    s,s_y,q,_ = episodes()
    for bad in (np.nan, np.inf):
        x = q.copy()
        x[1, 0, 0] = bad
        with pytest.raises(UserError, match='NaN or infinite'): logits(name, s, s_y, x, **SLOW.get(name, {}))
    with pytest.raises(UserError, match='class 1 has no support image'): logits(name, s, np.where(s_y == 1, 0, s_y), q, **SLOW.get(name, {}))
    with pytest.raises(UserError, match=r'takes support \(E, NS, D\)'): logits(name, s[0], s_y[0], q[0])

def test_names_are_looked_up():
    assert get_classifier('cosine') is inference.sum_of_cosines and get_classifier(len) is len
    with pytest.raises(UserError, match="unknown classifier 'cosinus': it is one of cosine, "): get_classifier('cosinus')
    with pytest.raises(UserError, match='unknown classifier'): evaluate(torch.eye(8), torch.arange(8), classifier='cosinus')

def test_which_look_at_the_queries_and_which_take_them_to_be_balanced():
    assert {k for k,f in CLASSIFIERS.items() if f.balanced} == {'tim_gd','tim_adm','pt_map'}
    assert {k for k,f in CLASSIFIERS.items() if f.transductive} == {f for f in CLASSIFIERS if hasattr(transductive, CLASSIFIERS[f].__name__) and CLASSIFIERS[f].__module__.endswith('transductive')}

def test_a_plan_has_the_asked_for_sums():
    plan = logits('pt_map', *episodes(K=1, Q=15)[:3])
    assert np.allclose(np.exp(plan).sum(2), 1, atol=1e-4) and np.allclose(np.exp(plan).sum(1), 15, atol=1e-3)
