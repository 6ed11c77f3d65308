"""Every classifier against a slow, plain restatement of its paper, and against other libraries where they have it."""
import inspect
from functools import partial

import easyfsl.methods
import numpy as np
import pytest
import timm
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression, RidgeClassifier

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.data.episodes import sample_episodes
from grdd_fastai.fewshot import inductive, transductive
from grdd_fastai.fewshot.classifiers import CLASSIFIERS, get_classifier
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import evaluate

SLOW = dict(tim_gd=dict(steps=60, lr=1e-3), alpha_tim=dict(steps=60, lr=1e-3)) # fewer steps, longer ones
GIVEN = SLOW | dict(simpleshot_cl2n=dict(mean=torch.tensor(.3)))

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

def cosine(s, y, q): return np.array([[cos([x], s[y == c]).mean() for c in range(y.max()+1)] for x in q])
def centroid(s, y, q): return -sq(q, means(s, y))
def centroid_cosine(s, y, q): return cos(q, means(s, y))
def simpleshot_l2n(s, y, q): return -sq(unit(q), means(unit(s), y))
def simpleshot_cl2n(s, y, q, mean=.3): return simpleshot_l2n(s - mean, y, q - mean)
def neighbour(s, y, q): return np.array([[max(cos([x], s[y == c])[0]) for c in range(y.max()+1)] for x in q])

def shots(y): return len(y) / (y.max()+1)
def rectified(s, y, q):
    "Support and shifted queries in the class they are nearest to by cosine, the mean of each times its softmax over the classes"
    p,moved = means(s, y),q + s.mean(0) - q.mean(0)
    images = [*s, *moved]
    C = [cos([x], p)[0] for x in images]
    members = [[softmax(10*c)[k]*x for c,x in zip(C, images) if c.argmax() == k] for k in range(len(p))]
    return np.array([np.mean(m, 0) if m else p[k] for k,m in enumerate(members)]),moved
def bd_cspn(s, y, q, shift=False):
    p,moved = rectified(unit(s), y, unit(q))
    return -sq(moved if shift else unit(q), p)

def laplacian_shot(s, y, q, weight=None, n_neighbours=2, steps=20, shift=False):
    if weight is None: weight = .7 if shots(y) < 5 else .3
    p,moved = rectified(unit(s), y, unit(q))
    q = moved if shift else unit(q)
    a,W = sq(q, p),np.zeros((len(q), len(q)))
    for i,row in enumerate(sq(q, q)): W[i, [j for j in row.argsort() if j != i][:n_neighbours]] = 1
    z = softmax(-a, 1)
    for _ in range(steps): z = softmax(weight*W @ z - a, 1)
    return np.log(z)

def pt_map(s, y, q, power=.5, scale=10., lr=.2, steps=20):
    z_s,z_q = (unit(z - z.mean(0)) for z in (unit((x + 1e-6)**power) for x in (s, q)))
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
def alpha_tim(s, y, q, steps=60, lr=1e-3):
    alpha = 2. if shots(y) < 2 else 5. if shots(y) < 5 else 7.
    def H(p): return (1 - sum(x**alpha for x in p)) / (alpha - 1)
    def loss(l_s, y, l_q):
        P = softmax(l_q, 1)
        return cross_entropy(l_s, y) - (H(P.mean(0)) - np.mean([H(p) for p in P]))
    return descent(s, y, q, loss, lr, steps)

PLAIN = dict(cosine=cosine, centroid=centroid, centroid_cosine=centroid_cosine, simpleshot_l2n=simpleshot_l2n,
             simpleshot_cl2n=simpleshot_cl2n, neighbour=neighbour, bd_cspn=bd_cspn, laplacian_shot=laplacian_shot, pt_map=pt_map,
             soft_kmeans=soft_kmeans, tim_adm=tim_adm, tim_gd=tim_gd, alpha_tim=alpha_tim)

@pytest.mark.parametrize('K', [1, 3, 5])
@pytest.mark.parametrize('name', PLAIN)
def test_the_plain_restatement(name, K):
    s,s_y,q,_ = episodes(E=2 if name in SLOW else 3, K=K, Q=4)
    # a plan; its logs of nothing may drift
    ours,seen = logits(name, s, s_y, q, **GIVEN.get(name, {})),np.exp if name == 'pt_map' else np.asarray
    for e in range(len(s)): assert np.allclose(seen(ours[e]), seen(PLAIN[name](s[e], s_y[e], q[e])), atol=2e-3, rtol=1e-3), e

@pytest.mark.parametrize('name, settings', [
    ('simpleshot_cl2n', dict(mean=np.full(6, .7, np.float32))), ('laplacian_shot', dict(weight=1.5, n_neighbours=3)),
    ('laplacian_shot', dict(shift=True)), ('bd_cspn', dict(shift=True))])
def test_settings(name, settings):
    s,s_y,q,_ = episodes()
    given = {k:torch.as_tensor(v) if isinstance(v, np.ndarray) else v for k,v in settings.items()}
    for e,ours in enumerate(logits(name, s, s_y, q, **given)):
        assert np.allclose(ours, PLAIN[name](s[e], s_y[e], q[e], **settings), atol=1e-4)

def test_every_classifier_has_its_restatement(): assert set(CLASSIFIERS) == {*PLAIN, 'ridge', 'logistic'}


# ---- scikit-learn -----------------------------------------------------------------------------------------------------

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
        assert np.allclose(ours, RidgeClassifier(alpha=.3, solver='cholesky').fit(unit(s[e]), s_y[e]).decision_function(unit(q[e])),
                           atol=1e-4)


# ---- easyfsl ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('method, K, n, name, settings', [
    ('SimpleShot', 1, 1000, 'simpleshot_l2n', {}),
    ('SimpleShot', 5, 300, 'centroid_cosine', {}), # of several shots easyfsl takes the cosine, the paper distances
    ('PrototypicalNetworks', 5, 300, 'centroid', {}), # its BDCSPN and LaplacianShot weigh images otherwise than the authors' programs do
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
    together = logits(name, s, s_y, q, **GIVEN.get(name, {}))
    for e in range(5): assert np.allclose(logits(name, s[e:e+1], s_y[e:e+1], q[e:e+1], **GIVEN.get(name, {}))[0], together[e], atol=1e-5)

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
    ours = logits(name, s, s_y, q, **GIVEN.get(name, {}))
    g = np.random.default_rng(1)
    a,b,c = g.permutation(s.shape[1]),g.permutation(q.shape[1]),g.permutation(4)
    other = logits(name, s[:, a], c[s_y[:, a]], q[:, b], **GIVEN.get(name, {}))
    assert np.allclose(other[..., c], ours[:, b], atol=1e-4)

@pytest.mark.parametrize('name', CLASSIFIERS)
def test_easy_episodes_are_solved_and_only_transductive_ones_look_at_other_queries(name):
    s,s_y,q,q_y = episodes(K=1, Q=15, D=32, noise=.3)
    settings = GIVEN.get(name, {})
    assert (logits(name, s, s_y, q, **settings).argmax(-1) == q_y).mean() > .95
    few = logits(name, s, s_y, q[:, :20], **settings)
    assert np.allclose(few, logits(name, s, s_y, q, **settings)[:, :20], atol=1e-5) != CLASSIFIERS[name].transductive

@pytest.mark.parametrize('name', CLASSIFIERS)
def test_inputs_are_left_alone_and_a_second_call_is_the_first(name):
    s,s_y,q,_ = (torch.as_tensor(a) for a in episodes())
    s,q = s.float(),q.float()
    before = s.clone(),q.clone()
    a,b = (CLASSIFIERS[name](s, s_y, q, **GIVEN.get(name, {})) for _ in range(2))
    assert (torch.equal(a, b) and torch.equal(s, before[0]) and torch.equal(q, before[1]) and a.dtype == torch.float32
            and not a.requires_grad)

@pytest.mark.parametrize('name', CLASSIFIERS)
def test_bad_input_gets_a_sentence(name):
    s,s_y,q,_ = episodes()
    for bad in (np.nan, np.inf):
        x = q.copy()
        x[1, 0, 0] = bad
        with pytest.raises(UserError, match='NaN or infinite'): logits(name, s, s_y, x, **GIVEN.get(name, {}))
    with pytest.raises(UserError, match='class 1 has no support image'):
        logits(name, s, np.where(s_y == 1, 0, s_y), q, **GIVEN.get(name, {}))
    with pytest.raises(UserError, match=r'takes support \(E, NS, D\)'): logits(name, s[0], s_y[0], q[0])

def test_names_are_looked_up():
    assert get_classifier('cosine') is inductive.mean_cosine and get_classifier(len) is len
    with pytest.raises(UserError, match="unknown classifier 'cosinus': it is one of cosine, "): get_classifier('cosinus')
    with pytest.raises(UserError, match='unknown classifier'): evaluate(torch.eye(8), torch.arange(8), classifier='cosinus')

def test_which_look_at_the_queries_and_which_take_them_to_be_balanced():
    assert {k for k,f in CLASSIFIERS.items() if f.balanced} == {'tim_gd','tim_adm','pt_map'}
    assert ({k for k,f in CLASSIFIERS.items() if f.transductive}
            == {f for f in CLASSIFIERS if hasattr(transductive, CLASSIFIERS[f].__name__)
                and CLASSIFIERS[f].__module__.endswith('transductive')})

def test_a_plan_has_the_asked_for_sums():
    plan = logits('pt_map', *episodes(K=1, Q=15)[:3])
    assert np.allclose(np.exp(plan).sum(2), 1, atol=1e-4) and np.allclose(np.exp(plan).sum(1), 15, atol=1e-3)

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

@pytest.mark.parametrize('a, b', [(torch.float64, torch.float64), (torch.float64, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_precision_is_kept_or_raised_never_lowered(a, b):
    s,s_y,q,_ = (torch.as_tensor(x) for x in episodes())
    out = CLASSIFIERS['cosine'](s.to(a), s_y, q.to(b))
    assert out.dtype == (torch.float32 if a == torch.bfloat16 else torch.float64)

def test_settings_that_a_classifier_does_not_have_are_a_sentence():
    s,s_y,q,_ = episodes()
    with pytest.raises(UserError, match="bd_cspn has no setting 'scael': its settings are scale, normalize, shift"):
        logits('bd_cspn', s, s_y, q, scael=1.)
    with pytest.raises(UserError, match='simpleshot_cl2n needs the mean feature'): logits('simpleshot_cl2n', s, s_y, q)


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
        z_s,z_q,y = torch.nn.functional.normalize(s[e], dim=1),torch.nn.functional.normalize(q[e], dim=1),s_y[e]
        W = torch.stack([z_s[y == c].mean(0) for c in range(5)]).requires_grad_()
        opt = torch.optim.Adam([W], lr=1e-4)
        def scores(z, W=W): return 15*(z @ W.T - W.square().sum(1)/2 - z.square().sum(1, keepdim=True)/2)
        for _ in range(1000):
            p_s,p_q = scores(z_s).softmax(1),scores(z_q).softmax(1)
            ce,m = -(p_s[torch.arange(len(y)), y] + 1e-12).log().mean(),p_q.mean(0)
            if alpha is None: loss = .1*ce - (-(m*m.log()).sum() - .1*-(p_q*(p_q + 1e-12).log()).sum(1).mean())
            else:
                a = alpha[K]
                loss = ce - (1 - m.pow(a).sum())/(a - 1) + ((1 - (p_q + 1e-12).pow(a).sum(1))/(a - 1)).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
        theirs = scores(z_q).detach()
        assert torch.allclose(ours[e], theirs, atol=1e-3) and (ours[e].argmax(1) == theirs.argmax(1)).all()
