"""What Figures 3 and 5 show, against loops."""
from types import SimpleNamespace

import numpy as np
import torch
from helpers import Y
from naive import cosine_of

from grdd_fastai.fewshot.figures import episode_relatedness, episode_rows, tsne_points


def test_rows_of_an_episode_are_class_by_class():
    support,query = episode_rows(Y, 4, 2, 3, seed=1)
    assert Y[support].reshape(4, 2).T.tolist() == [Y[support][::2].tolist()]*2 and (Y[query].reshape(4, 3) == Y[support][::2, None]).all()
    assert len({*support, *query}) == 20 and not np.array_equal(episode_rows(Y, 4, 2, 3, seed=2)[0], support)

def test_weights_are_the_softmax_of_cosines():
    g = torch.Generator().manual_seed(0)
    s,q = torch.randn(3, 5, generator=g),torch.randn(4, 5, generator=g)
    R = np.array([[cosine_of(a, b) for b in q.tolist()] for a in s.tolist()])
    for T,(whole,decoupled) in episode_relatedness(s, q, (.1, 2.)).items():
        e = np.exp(R/T)
        assert np.allclose(whole, e/e.sum(), rtol=1e-4) and np.allclose(decoupled, e/e.sum(1, keepdims=True), rtol=1e-4)

def test_tsne_shows_the_same_images_of_each_network_and_keeps_classes_together():
    split = SimpleNamespace(vocab=list('abcdefgh'), y=Y)
    far = 20*torch.eye(8)[Y] + torch.randn(len(Y), 8, generator=torch.Generator().manual_seed(0))
    points,y,names,rows = tsne_points(dict(one=far, two=far*4), split, n_classes=3, n_images=12)
    assert len(names) == 3 and [names[c] for c in y] == [split.vocab[c] for c in Y[rows]] and len(set(rows)) == len(rows) == 36
    assert np.array_equal(points['one'], points['two']) # features of the same directions
    d = np.linalg.norm(points['one'][:, None] - points['one'], axis=-1)
    nearest = (d + np.diag([np.inf]*len(d))).argmin(1)
    assert (y[nearest] == y).all()
