"""DataBlocks and loaders: what an episode is, what decides it, what `new` keeps."""
import random
from functools import partial

import albumentations as A
import numpy as np
import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import ColReader, ColSplitter
from fastai.vision.data import ImageBlock

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import category_dls, episode_block, episodic_dls
from grdd_fastai.data.episodes import EpisodicDL
from grdd_fastai.data.loaders import SeededDL


def pixels(data, x): "Undo normalisation"; mean,std = (torch.tensor(s).view(1, 3, 1, 1) for s in data.stats); return (x*std + mean)*255

def batches(dls, epoch=0):
    dls.train.epoch = epoch - 1
    return [(x.clone(), y.clone()) for x,y in dls.train]

def equal(a, b): return all(torch.equal(p[0], q[0]) and torch.equal(p[1], q[1]) for p,q in zip(a, b)) and len(a) == len(b)


def test_category_batches_are_the_packed_images_with_their_labels(data):
    dls = category_dls(data, bs=40, aug=None)
    assert dls.c == 6 and dls.vocab[:6] == data.train.vocab and len(dls.train) == 3
    seen = []
    for x,y in dls.train:
        rows = dls.train.get_idxs() # the epoch's own draw, again
        for xi,yi in zip(pixels(data, x), y):
            hit = (np.abs(np.asarray(data.train.images, float) - xi.permute(1, 2, 0).numpy()).max((1, 2, 3)) < 1).nonzero()[0]
            assert len(hit) == 1 and data.train.y[hit[0]] == yi
            seen.append(hit[0])
    assert sorted(seen) == list(range(120)) and seen != sorted(seen) and len(rows) == 120

def test_validation_holds_the_validation_classes_in_order(data):
    dls = category_dls(data)
    x = torch.cat([x for x,_ in dls.valid])
    assert torch.allclose(pixels(data, x).permute(0, 2, 3, 1), torch.tensor(np.asarray(data.val.images)).float(), atol=.01)

@pytest.mark.parametrize('way, shot, query, per_step', [(5,1,15,1), (3,4,2,3)])
def test_an_episode_is_class_major_and_disjoint(data, way, shot, query, per_step):
    dls = episodic_dls(data, way, shot, query, n_episodes=7, per_step=per_step, aug=None)
    dls.train.epoch = 0
    n,n_item,rows = 0,shot+query,dls.train.get_idxs()
    assert len(dls.train) == -(-7//per_step) == len(list(dls.train))
    for e in np.array(rows).reshape(7, way, n_item):
        assert len(set(e.flat)) == e.size and (data.train.y[e] == data.train.y[e][:, :1]).all()
        assert len(set(data.train.y[e][:, 0])) == way
    dls.train.epoch = -1 # the draw above was epoch 0's: these batches hold its images
    for x,y in dls.train:
        assert len(x) % (way*n_item) == 0
        assert (y.numpy() == data.train.y[rows[n:n+len(y)]]).all()
        assert torch.allclose(pixels(data, x).permute(0, 2, 3, 1), torch.tensor(data.train.images[rows[n:n+len(x)]]).float(), atol=.01)
        n += len(x)

@pytest.mark.parametrize('make', [category_dls, partial(episodic_dls, n_episodes=4)])
def test_all_randomness_is_of_seed_epoch_and_row(data, make):
    first = batches(make(data, seed=1), 3)
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    assert equal(first, batches(make(data, seed=1, num_workers=2), 3))
    assert not equal(first, batches(make(data, seed=1), 4)) and not equal(first, batches(make(data, seed=2), 3))

@pytest.mark.parametrize('make', [category_dls, partial(episodic_dls, n_episodes=4)])
def test_nothing_seeds_globally(data, make):
    "Callers with different random states keep different ones (torch's own loader draws from its state, which is no seeding)"
    def after(seed):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        batches(make(data, seed=1))
        return random.random(),np.random.rand(),torch.rand(()).item()
    assert all(a != b for a,b in zip(after(1), after(2)))

def test_epochs_go_on_by_themselves(data):
    dls = episodic_dls(data, n_episodes=2)
    first,second = ([x.clone() for x,_ in dls.train] for _ in range(2))
    assert not torch.equal(first[0], second[0]) and torch.equal(second[0], batches(episodic_dls(data, n_episodes=2), 1)[0][0])

def test_users_own_compose(data):
    x,_ = category_dls(data, bs=64, aug=A.Compose([A.CenterCrop(8, 8), A.InvertImg(p=1)])).one_batch()
    assert x.shape == (64, 3, 8, 8)
    assert torch.allclose(pixels(data, x).round()[0],
                          255 - pixels(data, category_dls(data, bs=64, aug=None).one_batch()[0]).round()[0, :, 4:12, 4:12], atol=1)

def test_new_keeps_what_an_episode_is(data):
    dl = episodic_dls(data, 3, 2, 4, n_episodes=5, per_step=2, seed=7).train
    new = dl.new()
    assert isinstance(new, EpisodicDL) and new.episode == dl.episode and new.seed == 7 and new.aug is dl.aug and len(new) == 3
    plain = dl.new(cls=SeededDL, bs=10, aug=None)
    assert type(plain) is SeededDL and len(plain.one_batch()[0]) == 10 and plain.aug is None

def test_new_and_a_shared_compose_keep_the_randomness(data):
    compose = A.Compose([A.RandomCrop(8, 8), A.HorizontalFlip(p=.5)])
    dls = category_dls(data, bs=40, aug=compose)
    first = batches(dls, 2)
    dls.train.new(), next(iter(episodic_dls(data, aug=compose).train))
    assert equal(first, batches(dls, 2))

def test_too_small_for_an_episode_is_one_sentence(data):
    with pytest.raises(UserError, match='train split has 6 classes, too few for 7-way'): episodic_dls(data, 7)
    with pytest.raises(UserError, match='class train0 of the train split has 20 images, too few for 1 support'):
        episodic_dls(data, 5, 1, 20)

def test_block_is_a_fastai_datablock(data):
    dls = episode_block(data, n_way=2, k_shot=1, n_query=3, n_episodes=2).dataloaders(data, num_workers=0)
    assert dls.one_batch()[0].shape == (8, 3, 16, 16) and len(dls.train_ds) == 120
    x,y = dls.train_ds[25]
    assert (x.permute(1, 2, 0).numpy() == data.train.images[25]).all() and y == 1

def test_episodes_of_any_fastai_dataset(csv_set):
    "EpisodicDL over files, the way fastai reads them: no packing"
    import pandas as pd
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

def test_images_that_fit_lie_on_the_device(data):
    "The same batches from a tensor that holds all images; too little room leaves them where they are"
    dls,held = category_dls(data, bs=40),category_dls(data, bs=40)
    images = held.train.packed
    n_bytes = 240*16*16*3
    images.hold(torch.device('cpu'), n_bytes - 1)
    assert isinstance(images.images[0], np.memmap)
    images.hold(torch.device('cpu'), n_bytes)
    assert all(isinstance(o, torch.Tensor) and o.dtype == torch.uint8 for o in images.images)
    assert equal(batches(dls), batches(held)) and torch.equal(held.valid.one_batch()[0], dls.valid.one_batch()[0])
    by_albumentations = category_dls(data, bs=40, aug=A.Compose([A.HorizontalFlip(p=.5)]))
    by_albumentations.train.packed.hold(torch.device('cpu'), n_bytes)
    assert equal(batches(by_albumentations), batches(category_dls(data, bs=40, aug=A.Compose([A.HorizontalFlip(p=.5)]))))
