"""Every classifier against a slow, plain restatement of its paper and against other libraries, and what holds for all."""
from functools import partial

import easyfsl.methods
import numpy as np
import pytest
import torch
from helpers import GIVEN, SLOW, episodes, logits, says
from naive import PLAIN

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.episodes import sample_episodes
from grdd_fastai.fewshot import inductive, transductive
from grdd_fastai.fewshot.classifiers import CLASSIFIERS, get_classifier, split_names
from grdd_fastai.fewshot.evaluate import evaluate


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

def test_every_classifier_has_its_restatement(): assert set(CLASSIFIERS) == {*PLAIN, 'lda', 'ridge', 'logistic'}

@pytest.mark.parametrize('method, K, n, name, settings', [
    ('SimpleShot', 1, 1000, 'simpleshot_l2n', {}),
    ('SimpleShot', 5, 300, 'prototype_cosine', {}), # of several shots easyfsl takes the cosine, the paper distances
    ('PrototypicalNetworks', 5, 300, 'prototype', {}), # its BDCSPN and LaplacianShot weigh images otherwise than the authors' programs do
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

@pytest.mark.parametrize('classifier', ['cosine', 'prototype', 'ridge', 'logistic', 'simpleshot_l2n', 'tim_adm'])
@pytest.mark.parametrize('factor', [1e25, 1e-25, 0.])
def test_features_whose_lengths_cannot_be_computed(classifier, factor):
    h = torch.eye(6).repeat_interleave(20, 0)
    says(lambda: evaluate(h*factor, torch.arange(6).repeat_interleave(20), n_episodes=10, classifier=classifier), 'the largest feature is')

def test_a_classifier_in_a_file_of_ones_own(tmp_path, monkeypatch):
    before = dict(CLASSIFIERS)
    try:
        (tmp_path/'mine.py').write_text('from grdd_fastai.fewshot.inductive import mean_cosine\n'
                                        'def opposite(support, support_y, query, power=1.):\n'
                                        '    return -mean_cosine(support, support_y, query)*power\n')
        monkeypatch.chdir(tmp_path)
        names = split_names('cosine,mine.py:opposite(power=2)')
        assert names == ['cosine', 'opposite(power=2)'] and split_names('mine.py:opposite') == ['opposite']
        s,s_y,q,_ = map(torch.from_numpy, episodes())
        assert torch.allclose(get_classifier(names[1])(s, s_y, q), -2*get_classifier('cosine')(s, s_y, q))
        (tmp_path/'cosine.py').write_text('def cosine(support, support_y, query): return 0')
        (tmp_path/'broken.py').write_text('import nothing_like_this')
        for text,*words in (('gone.py:f', 'gone.py cannot be used', 'FileNotFound'),
                            ('broken.py:f', 'broken.py cannot be used', 'nothing_like'),
                            ('mine.py:other', "no function 'other'"), ('cosine.py:cosine', "a classifier 'cosine' already"),
                            ('mine.py:opposite(x=1)', "no setting 'x'")):
            says(lambda text=text: split_names(text), *words)
        assert CLASSIFIERS.keys() == before.keys() | {'opposite'}
    finally:
        CLASSIFIERS.clear()
        CLASSIFIERS.update(before)
