"""Episodes: what one is, the laws of sampling, and a sentence for what cannot be drawn."""
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import ColReader, ColSplitter
from fastai.vision.data import ImageBlock
from helpers import Y, all_episodes, all_unbalanced, pixels

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import category_dls, episodic_dls
from grdd_fastai.data.episodes import BLOCK, EpisodicDL, training_episodes
from grdd_fastai.data.loaders import SeededDL

# ---- of features, to evaluate -----------------------------------------------------------------------------------------

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


# ---- of images, to train ----------------------------------------------------------------------------------------------

def nested_choices(rng, by_class, n_way, n_item, n_episodes):
    "Episodes by two nested calls of numpy's own `choice`"
    return np.array([[rng.choice(by_class[c], n_item, replace=False) for c in rng.choice(len(by_class), n_way, replace=False)]
                     for _ in range(n_episodes)])

@pytest.mark.parametrize('sizes, way, n_item', [([600]*64, 20, 7), ([600]*64, 5, 16), ([8, 9, 30, 12, 50, 31], 5, 6), ([20]*5, 5, 6),
                                                ([6, 9, 9, 9], 3, 6), ([12_000]*3, 2, 7)])
def test_training_episodes_are_those_of_numpys_choice(sizes, way, n_item):
    "Also where numpy takes fewer random words, because all classes or all images are chosen, or another algorithm, from 10,000 on"
    starts = np.cumsum([0, *sizes])
    by_class = [np.arange(a, b)[::-1] for a,b in zip(starts, starts[1:], strict=False)]
    for seed in range(3):
        found,expected = (f(np.random.default_rng([seed, 1]), by_class, way, n_item, 50) for f in (training_episodes, nested_choices))
        assert (found == expected).all()

def test_a_word_that_numpy_refuses_is_left_out(monkeypatch):
    "This is rare even for large classes; with this seed it happens once"
    by_class,refused,delete = [np.arange(9999)]*300,[],np.delete
    monkeypatch.setattr(np, 'delete', lambda *args: refused.append(1) or delete(*args))
    found,expected = (f(np.random.default_rng(1), by_class, 20, 7, 200) for f in (training_episodes, nested_choices))
    assert (found == expected).all() and refused

@pytest.mark.parametrize('way, shot, query, episodes_per_step', [(5,1,15,1), (3,4,2,3)])
def test_an_episode_is_class_major_and_disjoint(data, way, shot, query, episodes_per_step):
    dls = episodic_dls(data, way, shot, query, n_episodes=7, episodes_per_step=episodes_per_step, aug=None)
    dls.train.epoch = 0
    n,n_item,rows = 0,shot+query,dls.train.get_idxs()
    assert len(dls.train) == -(-7//episodes_per_step) == len(list(dls.train))
    for e in np.array(rows).reshape(7, way, n_item):
        assert len(set(e.flat)) == e.size and (data.train.y[e] == data.train.y[e][:, :1]).all()
        assert len(set(data.train.y[e][:, 0])) == way
    dls.train.epoch = -1 # the draw above was epoch 0's: these batches hold its images
    for x,y in dls.train:
        assert len(x) % (way*n_item) == 0
        assert (y.numpy() == data.train.y[rows[n:n+len(y)]]).all()
        assert torch.allclose(pixels(data, x).permute(0, 2, 3, 1), torch.tensor(data.train.images[rows[n:n+len(x)]]).float(), atol=.01)
        n += len(x)

def test_new_keeps_what_an_episode_is(data):
    dl = episodic_dls(data, 3, 2, 4, n_episodes=5, episodes_per_step=2, seed=7).train
    new = dl.new()
    assert isinstance(new, EpisodicDL) and new.episode == dl.episode and new.seed == 7 and new.aug is dl.aug and len(new) == 3
    plain = dl.new(cls=SeededDL, bs=10, aug=None)
    assert type(plain) is SeededDL and len(plain.one_batch()[0]) == 10 and plain.aug is None

def test_episodes_of_any_fastai_dataset(csv_set):
    "EpisodicDL over files, the way fastai reads them: no packing"
    df = pd.read_csv(csv_set/'train.csv').assign(is_valid=lambda d: d.index % 5 == 0)
    block = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('filename', pref=f'{csv_set}/images/'), get_y=ColReader('label'),
                      splitter=ColSplitter(), dl_type=partial(EpisodicDL, n_way=3, k_shot=1, n_query=2, n_episodes=2))
    dls = block.dataloaders(df, num_workers=0)
    x,y = dls.one_batch()
    assert x.shape == (9, 3, 16, 16) and (y.view(3, 3) == y.view(3, 3)[:, :1]).all() and len(set(y.tolist())) == 3

def test_show_batch_draws_support_and_query_rows(data):
    import matplotlib.pyplot as plt
    plt.close('all')
    episodic_dls(data, 4, 2, 6).show_batch()
    axes = plt.gcf().axes
    assert len(axes) == 4*8 and axes[0].get_title(loc='left') == 'support' and axes[2].get_title(loc='left') == 'query'
    assert {axes[i*8].get_ylabel() for i in range(4)} <= set(data.train.vocab)
    assert all(len(ax.images) == 1 for ax in axes)
    category_dls(data).show_batch()
    assert len(plt.gcf().axes) == 9 and plt.gcf().axes[0].get_title() in data.train.vocab

def test_an_episode_is_never_split(data):
    dls = [episodic_dls(data, 3, 1, 4, n_episodes=7, episodes_per_step=4).train for _ in range(3)]
    alone,a,b = dls[0],dls[1].for_rank(0, 2),dls[2].for_rank(1, 2)
    whole = np.array(alone.get_idxs()).reshape(7, 15)
    assert len(a) == len(b) == 1 and [dl.bs for dl in (alone, a, b)] == [60, 30, 30]
    assert (np.array(a.get_idxs()).reshape(2, 15) == whole[[0, 1]]).all() and (np.array(b.get_idxs()).reshape(2, 15) == whole[[2, 3]]).all()
    one = episodic_dls(data, 3, 1, 4, n_episodes=7).train
    assert [len(one.for_rank(r, 3)) for r in range(3)] == [2, 2, 2] # seven episodes, one in each process: the last is left out

def test_too_small_for_an_episode_is_one_sentence(data):
    with pytest.raises(UserError, match='train split has 6 classes, too few for 7-way'): episodic_dls(data, 7)
    with pytest.raises(UserError, match='class train0 of the train split has 20 images, too few for 1 support'):
        episodic_dls(data, 5, 1, 20)

def test_episodes_of_one_class_teach_nothing(data):
    with pytest.raises(UserError, match='an episode of 1 way: it must be a whole number, at least 2'): episodic_dls(data, 1, 1, 3, 2)
