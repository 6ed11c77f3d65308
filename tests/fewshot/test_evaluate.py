"""Accuracy on episodes against loops and known answers; what features and classes may be."""
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT, Y, all_episodes, all_unbalanced, says
from naive import naive_accuracy, naive_accuracy_of_views

from grdd_fastai.core.errors import UserError
from grdd_fastai.fewshot.evaluate import CHUNK_BYTES, evaluate


def test_accuracy_is_the_naive_loops():
    g = torch.Generator().manual_seed(0)
    h = torch.randn(len(Y), 6, generator=g) + torch.eye(8)[Y][:, :6]
    accs = [naive_accuracy(h, support, query.ravel(), np.repeat(np.arange(5), 4))
            for support,query in zip(*all_episodes(Y, 5, 2, 4, 40, seed=3))]
    ev = evaluate(h, Y, 5, 2, 4, 40, seed=3)
    assert np.allclose(ev.episodes, accs) and ev.accuracy == pytest.approx(np.mean(accs))
    assert ev.ci95 == pytest.approx(1.96*np.std(accs, ddof=1)/np.sqrt(40))

def test_accuracy_with_uneven_queries_is_the_naive_loops():
    y = np.repeat(np.arange(8), 40)
    h = torch.eye(8)[y] + torch.randn(len(y), 8, generator=torch.Generator().manual_seed(0))
    accs = [naive_accuracy(h, *episode) for episode in zip(*all_unbalanced(y, 5, 1, 4, 30))]
    e = evaluate(h, y, 5, 1, 4, 30, query_distribution='dirichlet')
    assert np.allclose(e.episodes, accs) and 'dirichlet' in e.episode_id
    with pytest.raises(UserError, match='the same episodes'): e - evaluate(h, y, 5, 1, 4, 30)
    with pytest.raises(UserError, match='is one of balanced, dirichlet'): evaluate(h, y, query_distribution='even')
    with pytest.raises(UserError, match='too few for 1 support'): evaluate(h, y, n_query=15, query_distribution='dirichlet')

def test_separable_features_are_always_right_and_random_ones_at_chance():
    ev = evaluate(torch.eye(8)[Y], Y, n_episodes=600)
    assert ev.accuracy == 100 and ev.ci95 == 0
    ev = evaluate(torch.randn(len(Y), 16, generator=torch.Generator().manual_seed(0)), Y, n_episodes=600)
    assert abs(ev.accuracy - 20) < 2

def test_augmented_views_are_the_support():
    "Views that are the image itself change nothing but the scale; others are averaged with it, by hand"
    g = torch.Generator().manual_seed(0)
    h = torch.eye(8)[Y] + torch.randn(len(Y), 8, generator=g)
    whole = evaluate(h, Y, 5, 2, 4, 40)
    assert (evaluate(h, Y, 5, 2, 4, 40, views=h.expand(3, -1, -1)).episodes == whole.episodes).all()
    views = h + torch.randn(3, *h.shape, generator=g)
    e = evaluate(h, Y, 5, 2, 4, 40, views=views)
    for support,query,acc in zip(*all_episodes(Y, 5, 2, 4, 40), e.episodes):
        assert acc == pytest.approx(naive_accuracy_of_views(h, views, support, query))
    assert e.classifier == 'cosine, support of 3 views' and (e - whole).ci95 > 0 # the same episodes: they can be compared
    with pytest.raises(UserError, match='views of shape'): evaluate(h, Y, views=views[:, :9])

def test_several_classifiers_in_one_pass_are_each_alone():
    h = torch.eye(8)[Y] + torch.randn(len(Y), 8, generator=torch.Generator().manual_seed(0))
    names = ['cosine','bd_cspn','pt_map']
    together = evaluate(h, Y, 4, 2, 5, 70, classifier=names)
    assert list(together) == names and len({e.accuracy for e in together.values()}) == 3
    for name,e in together.items():
        assert (evaluate(h, Y, 4, 2, 5, 70, classifier=name).episodes == e.episodes).all() and e.classifier == name
    assert (together['cosine'] - evaluate(h, Y, 4, 2, 5, 70)).mean == 0

def test_wide_features_take_no_more_memory_and_change_nothing(monkeypatch):
    h = torch.randn(len(Y), 16, generator=torch.Generator().manual_seed(0))
    whole = evaluate(h, Y, n_episodes=200)
    monkeypatch.setattr('grdd_fastai.fewshot.evaluate.CHUNK_BYTES', [3*5*16*16*4]*2) # three episodes
    assert (evaluate(h, Y, n_episodes=200).episodes == whole.episodes).all()

def test_features_are_classified_in_chunks_of_a_size():
    "The most features a classifier is ever handed, of five times as many episodes, and within the budget"
    seen = []
    def noting(support, support_y, query):
        seen.append(support.numel() + query.numel())
        return torch.zeros(*query.shape[:2], 5)
    h = torch.rand(len(Y), 256)
    most = []
    for n in (1000, 5000):
        evaluate(h, Y, n_episodes=n, classifier=noting)
        most.append((max(seen), len(seen)))
        seen.clear()
    assert most[1][0] == most[0][0] <= CHUNK_BYTES[0]/4 and most[1][1] == 5*most[0][1]

def test_memory_does_not_grow_with_the_episodes():
    "The most a process of its own takes for ten times the episodes, beside the accuracies themselves (8 bytes each)"
    code = '''
import resource, sys, torch
from grdd_fastai.core.device import keep_freed_memory
from grdd_fastai.fewshot.evaluate import evaluate
keep_freed_memory()
torch.set_num_threads(1)
h,y = torch.randn(600, 16),torch.arange(20).repeat_interleave(30)
def peak(n): evaluate(h, y, 5, 1, 15, n); return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(peak(5_000), peak(50_000))
'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=300,
                          cwd=ROOT)
    few,many = map(float, done.stdout.split())
    assert many - few < 25, (few, many) # megabytes

@pytest.mark.parametrize('kwargs, says',
                         [(dict(n_way=9), 'has 8 classes, too few for 9-way'), (dict(n_query=30), 'has 30 images, too few for 1 support')])
def test_impossible_episodes_are_one_sentence(kwargs, says):
    with pytest.raises(UserError, match=says): evaluate(torch.eye(8)[Y], Y, **kwargs)

@pytest.mark.parametrize('kwargs', [dict(n_episodes=0), dict(k_shot=0), dict(n_query=0), dict(n_way=0)])
def test_nothing_to_evaluate_is_one_sentence(kwargs):
    with pytest.raises(UserError, match='at least [12]'): evaluate(torch.eye(8)[Y], Y, **kwargs)

def test_nan_features_are_one_sentence():
    with pytest.raises(UserError, match='NaN'): evaluate(torch.full((len(Y), 2), float('nan')), Y)


# ---- what features, classes and arguments may be ----------------------------------------------------------------------

def blobs(n=30, C=6, D=8):
    y = np.repeat(np.arange(C), n)
    g = np.random.default_rng(0)
    return g.normal(size=(C, D))[y] + .8*g.normal(size=(len(y), D)),y

WORDS = dict(n_way=3, n_query=5, n_episodes=40)

@pytest.mark.parametrize('kind', ['array', 'float64', 'list of names', 'strings', 'float classes', 'half', 'int', 'pandas'])
def test_features_and_classes_of_any_kind(kind):
    h,y = blobs()
    want = evaluate(torch.tensor(h).float(), torch.tensor(y), **WORDS)
    names = np.array([f'class {c}' for c in y])
    got = evaluate(**WORDS, **{'array':dict(h=h.astype(np.float32), y=y), 'float64':dict(h=torch.tensor(h), y=y),
                              'list of names':dict(h=h, y=list(names)), 'strings':dict(h=h, y=names),
                              'pandas':dict(h=pd.DataFrame(h), y=pd.Series(names)), 'float classes':dict(h=h, y=y.astype(float)),
                              'half':dict(h=torch.tensor(h).half(), y=y), 'int':dict(h=(100*h).astype(np.int64), y=y)}[kind])
    assert got.episode_id == want.episode_id and got.accuracy == pytest.approx(want.accuracy, abs=2) and 40 < got.accuracy < 100

def test_rows_of_pandas_in_another_order_are_a_sentence():
    h,y = blobs()
    with pytest.raises(UserError, match='have other names'): evaluate(pd.DataFrame(h).sample(frac=1, random_state=0), pd.Series(y), **WORDS)

@pytest.mark.parametrize('h, y, says', [
    (np.zeros((100, 4)), np.zeros(50), r'100 rows of features and classes of shape \(50,\)'),
    (np.zeros(9), np.zeros(9), 'the features have the shape'), (['a'], [1], 'the features are no numbers'),
    (np.zeros((0, 4)), [], 'the features have the shape'),
    (np.zeros((2, 4)), [1., np.nan], 'a class is missing'), (np.zeros((2, 4)), ['a', None], 'a class is missing'),
    (np.zeros((2, 4)), np.array(['a', 3], object), 'of several kinds')])
def test_features_and_classes_that_cannot_be(h, y, says):
    with pytest.raises(UserError, match=says): evaluate(h, y)

@pytest.mark.parametrize('classifier, says', [
    (lambda s, y, q: torch.full((*q.shape[:2], 3), torch.nan), 'gives logits that are NaN or infinite'),
    (lambda s, y, q: q, r'gives \(40, 15, 8\): a classifier gives logits \(E, NQ, C\), here \(40, 15, 3\)'),
    (lambda s, y, q: q[0], r'a classifier gives logits'), (lambda s, y, q: None, 'gives NoneType')])
def test_a_classifier_of_ones_own_that_is_wrong(classifier, says):
    with pytest.raises(UserError, match=says): evaluate(*blobs(), classifier=classifier, **WORDS)

@pytest.mark.parametrize('bad', [dict(n_way='5'), dict(k_shot=1.5), dict(n_episodes=True), dict(seed=-1), dict(classifier=[]),
                                 dict(classifier=[['cosine']]),
                                 dict(classifier=lambda s, y, q: torch.ones(*q.shape[:2], 5, dtype=torch.bool)),
                                 dict(query_distribution=['x'])])
def test_more_arguments_of_evaluate(bad):
    h,y = torch.randn(200, 8),torch.arange(10).repeat_interleave(20)
    says(lambda: evaluate(h, y, **dict(n_episodes=5) | bad))
