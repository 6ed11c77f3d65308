"""Episodes and their accuracy against loops, known answers and the laws of sampling."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.data.episodes import BLOCK, sample_episodes, sample_unbalanced
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import CHUNK, evaluate
from grdd_fastai.fewshot.stats import mean_ci95
from grdd_fastai.models.create import create_backbone

Y = np.repeat(np.arange(8), 30)

def all_episodes(*args, **kwargs): return [np.concatenate(o) for o in zip(*sample_episodes(*args, **kwargs))]


@pytest.mark.parametrize('way, shot, query', [(5,1,15), (8,5,25), (2,3,1)])
def test_episodes_are_disjoint_and_of_distinct_classes(way, shot, query):
    support,query_rows = all_episodes(Y, way, shot, query, 300)
    assert support.shape == (300, way, shot) and query_rows.shape == (300, way, query)
    rows = np.concatenate([support, query_rows], -1)
    assert all(len(set(e.flat)) == e.size for e in rows)
    assert (Y[rows] == Y[support][..., :1]).all() and all(len(set(c)) == way for c in Y[support][..., 0])

def test_seed_gives_the_episodes_and_more_begin_with_the_fewer():
    a,b,c = (all_episodes(Y, n_episodes=n, seed=s) for n,s in ((BLOCK+7, 0), (BLOCK//2, 0), (BLOCK//2, 1)))
    assert (a[0][:BLOCK//2] == b[0]).all() and (a[1][:BLOCK//2] == b[1]).all() and not (b[0] == c[0]).all()

def test_every_class_and_image_is_equally_likely_in_every_place():
    support,query = all_episodes(Y, 5, 2, 3, 20_000)
    for place in (support[..., 0], support[..., 1], query[..., 0], query[..., 2]):
        count = np.bincount(place.ravel(), minlength=len(Y))
        expected = place.size / len(Y)
        chi2 = ((count - expected)**2 / expected).sum()
        assert abs(chi2 - (len(Y)-1)) < 5*np.sqrt(2*(len(Y)-1))

def test_classes_of_unequal_size():
    y = np.array([0]*4 + [1]*50 + [2]*7)
    support,query = all_episodes(y, 3, 1, 3, 200)
    assert set(support[y[support] == 0]) | set(query[y[query] == 0]) == {0,1,2,3}

def test_accuracy_is_the_naive_loops():
    g = torch.Generator().manual_seed(0)
    h = torch.randn(len(Y), 6, generator=g) + torch.eye(8)[Y][:, :6]
    accs = []
    for support,query in zip(*all_episodes(Y, 5, 2, 4, 40, seed=3)):
        right = 0
        for c in range(5):
            for q in query[c]:
                sigma = [sum(float(torch.dot(h[s], h[q])/h[s].norm()/h[q].norm()) for s in support[k]) for k in range(5)]
                right += int(np.argmax(sigma) == c)
        accs.append(100*right/20)
    ev = evaluate(h, Y, 5, 2, 4, 40, seed=3)
    assert np.allclose(ev.episodes, accs) and ev.accuracy == pytest.approx(np.mean(accs))
    assert ev.ci95 == pytest.approx(1.96*np.std(accs, ddof=1)/np.sqrt(40))

def test_separable_features_are_always_right_and_random_ones_at_chance():
    ev = evaluate(torch.eye(8)[Y], Y, n_episodes=600)
    assert ev.accuracy == 100 and ev.ci95 == 0
    ev = evaluate(torch.randn(len(Y), 16, generator=torch.Generator().manual_seed(0)), Y, n_episodes=600)
    assert abs(ev.accuracy - 20) < 2

def test_paired_difference_is_far_tighter_than_two_intervals():
    g = torch.Generator().manual_seed(0)
    h = torch.eye(8)[Y] + .5*torch.randn(len(Y), 8, generator=g)
    a,b = evaluate(h, Y, n_episodes=500),evaluate(h + .05*torch.randn(h.shape, generator=g), Y, n_episodes=500)
    assert (a-b).mean == pytest.approx(a.accuracy - b.accuracy) and (a-b).ci95 < .5*a.ci95

def test_mean_ci95_by_hand(): assert mean_ci95([1, 3]) == (2, pytest.approx(1.96))

def test_embed_is_the_network_on_each_normalised_image(data):
    net = create_backbone('convnet4', 7, 16).train()
    h,y = embed(net, plain_dl(data, 'val', bs=50))
    assert net.training and (y.numpy() == data.val.y).all() and h.shape == (len(data.val), 64)
    net.eval().reset_classifier(0)
    mean,std = (torch.tensor(s).view(3, 1, 1) for s in data.stats)
    for i in (0, 63, len(data.val)-1):
        x = (torch.tensor(data.val.images[i]).permute(2, 0, 1)/255 - mean)/std
        with torch.no_grad(): assert torch.allclose(net(x[None])[0], h[i], atol=1e-4)

@pytest.mark.parametrize('kwargs, says',
                         [(dict(n_way=9), 'has 8 classes, too few for 9-way'), (dict(n_query=30), 'has 30 images, too few for 1 support')])
def test_impossible_episodes_are_one_sentence(kwargs, says):
    with pytest.raises(UserError, match=says): evaluate(torch.eye(8)[Y], Y, **kwargs)

@pytest.mark.parametrize('kwargs', [dict(n_episodes=0), dict(k_shot=0), dict(n_query=0), dict(n_way=0)])
def test_nothing_to_evaluate_is_one_sentence(kwargs):
    with pytest.raises(UserError, match='at least [12]'): evaluate(torch.eye(8)[Y], Y, **kwargs)

def test_wide_features_take_no_more_memory_and_change_nothing(monkeypatch):
    h = torch.randn(len(Y), 16, generator=torch.Generator().manual_seed(0))
    whole = evaluate(h, Y, n_episodes=200)
    monkeypatch.setattr('grdd_fastai.fewshot.evaluate.CHUNK', [3*5*16*16*4]*2) # three episodes
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
    assert most[1][0] == most[0][0] <= CHUNK[0]/4 and most[1][1] == 5*most[0][1]

def test_several_classifiers_in_one_pass_are_each_alone():
    h = torch.eye(8)[Y] + torch.randn(len(Y), 8, generator=torch.Generator().manual_seed(0))
    names = ['cosine','bd_cspn','pt_map']
    together = evaluate(h, Y, 4, 2, 5, 70, classifier=names)
    assert list(together) == names and len({e.accuracy for e in together.values()}) == 3
    for name,e in together.items():
        assert (evaluate(h, Y, 4, 2, 5, 70, classifier=name).episodes == e.episodes).all() and e.classifier == name
    assert (together['cosine'] - evaluate(h, Y, 4, 2, 5, 70)).mean == 0

def test_uneven_queries_are_disjoint_of_their_classes_and_as_many_in_all():
    y = np.repeat(np.arange(8), 90)
    support,query,query_y = all_unbalanced(y, 5, 1, 15, 700)
    assert support.shape == (700, 5, 1) and query.shape == query_y.shape == (700, 75)
    for s,q,q_y in zip(support, query, query_y):
        assert len({*s.flat, *q}) == 80 and (y[q] == y[s[q_y, 0]]).all()

def test_uneven_queries_are_dirichlets():
    "Mean and variance of a class's number of queries, 75 x Dirichlet(2), by the distribution's formulas; every image as likely"
    y = np.repeat(np.arange(6), 90)
    _,query,query_y = all_unbalanced(y, 5, 1, 15, 4000)
    counts = np.stack([(query_y == c).sum(1) for c in range(5)], 1)
    assert (counts.sum(1) == 75).all() and np.allclose(counts.mean(0), 15, atol=.5)
    assert counts.var(0) == pytest.approx([75**2 * .2*.8/11]*5, rel=.08)
    seen = np.bincount(query.ravel(), minlength=len(y))
    assert abs(((seen - seen.mean())**2 / seen.mean()).sum() - len(y)) < 5*np.sqrt(2*len(y))
    even = all_unbalanced(y, 5, 1, 15, 50, concentration=1e6)[2]
    assert all((np.bincount(q, minlength=5) == 15).all() for q in even)

def all_unbalanced(*args, **kwargs): return [np.concatenate(o) for o in zip(*sample_unbalanced(*args, **kwargs))]

def test_accuracy_with_uneven_queries_is_the_naive_loops():
    y = np.repeat(np.arange(8), 40)
    h = torch.eye(8)[y] + torch.randn(len(y), 8, generator=torch.Generator().manual_seed(0))
    accs = [100*np.mean([int(np.argmax([float(h[q] @ h[s[0]]/h[s[0]].norm()) for s in support]) == c) for q,c in zip(query, query_y)])
            for support,query,query_y in zip(*all_unbalanced(y, 5, 1, 4, 30))]
    e = evaluate(h, y, 5, 1, 4, 30, query_distribution='dirichlet')
    assert np.allclose(e.episodes, accs) and 'dirichlet' in e.drawn
    with pytest.raises(UserError, match='the same episodes'): e - evaluate(h, y, 5, 1, 4, 30)
    with pytest.raises(UserError, match='is one of balanced, dirichlet'): evaluate(h, y, query_distribution='even')
    with pytest.raises(UserError, match='too few for 1 support'): evaluate(h, y, n_query=15, query_distribution='dirichlet')

def test_augmented_views_are_the_support():
    "Views that are the image itself change nothing but the scale; others are averaged with it, by hand"
    g = torch.Generator().manual_seed(0)
    h = torch.eye(8)[Y] + torch.randn(len(Y), 8, generator=g)
    whole = evaluate(h, Y, 5, 2, 4, 40)
    assert (evaluate(h, Y, 5, 2, 4, 40, views=h.expand(3, -1, -1)).episodes == whole.episodes).all()
    views = h + torch.randn(3, *h.shape, generator=g)
    e = evaluate(h, Y, 5, 2, 4, 40, views=views)
    unit = torch.nn.functional.normalize(views, dim=-1).sum(0)
    for support,query,acc in zip(*all_episodes(Y, 5, 2, 4, 40), e.episodes):
        right = [int(np.argmax([float(h[q] @ unit[s].sum(0)) for s in support]) == c) for c in range(5) for q in query[c]]
        assert acc == pytest.approx(100*np.mean(right))
    assert e.classifier == 'cosine, support of 3 views' and (e - whole).ci95 > 0 # the same episodes: they can be compared
    with pytest.raises(UserError, match='views of shape'): evaluate(h, Y, views=views[:, :9])

def test_nan_features_are_one_sentence():
    with pytest.raises(UserError, match='NaN'): evaluate(torch.full((len(Y), 2), float('nan')), Y)


# ---- what features and classes may be ---------------------------------------------------------------------------------

def blobs(n=30, C=6, D=8):
    y = np.repeat(np.arange(C), n)
    g = np.random.default_rng(0)
    return g.normal(size=(C, D))[y] + .8*g.normal(size=(len(y), D)),y

WORDS = dict(n_way=3, n_query=5, n_episodes=40)

@pytest.mark.parametrize('kind', ['array', 'float64', 'list of names', 'strings', 'float classes', 'half', 'int'])
def test_features_and_classes_of_any_kind(kind):
    h,y = blobs()
    want = evaluate(torch.tensor(h).float(), torch.tensor(y), **WORDS)
    names = np.array([f'class {c}' for c in y])
    got = evaluate(**WORDS, **{'array':dict(h=h.astype(np.float32), y=y), 'float64':dict(h=torch.tensor(h), y=y),
                              'list of names':dict(h=h, y=list(names)), 'strings':dict(h=h, y=names),
                              'float classes':dict(h=h, y=y.astype(float)),
                              'half':dict(h=torch.tensor(h).half(), y=y), 'int':dict(h=(100*h).astype(np.int64), y=y)}[kind])
    assert got.drawn == want.drawn and got.accuracy == pytest.approx(want.accuracy, abs=2) and 40 < got.accuracy < 100

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
                          cwd=Path(__file__).parent.parent)
    few,many = map(float, done.stdout.split())
    assert many - few < 25, (few, many) # megabytes
