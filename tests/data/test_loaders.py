"""Loaders: what decides a batch, where images lie, and the shares of several processes."""
import random
from functools import partial

import albumentations as A
import numpy as np
import pytest
import torch
from helpers import batches, equal, pixels

from grdd_fastai.data.augment import AUGMENTATIONS, seeded, train_augmentation
from grdd_fastai.data.blocks import category_dls, episodic_dls, plain_dl


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

@pytest.mark.parametrize('by', AUGMENTATIONS)
def test_views_come_one_after_the_other_and_are_the_same_for_every_seed(data, by):
    "An image is augmented by its row and its view alone: the seed of the order and the number of workers change nothing"
    aug,epochs = train_augmentation(16, by=by),{}
    single = seeded(aug)
    images = torch.tensor(data.train.images).permute(0, 3, 1, 2)
    for seed,workers in ((1, 0), (2, 0), (1, 2)):
        dl = category_dls(data, bs=40, seed=seed, aug=aug, views=3, num_workers=workers).train
        seen = {}
        for epoch in range(4):
            dl.epoch = epoch - 1
            order = random.Random(f'{seed} {epoch}').sample(range(len(data.train)), len(data.train))
            for i,(x,_) in enumerate(dl):
                for row,pixel in zip(order[40*i:], pixels(data, x).round().to(torch.uint8), strict=False): seen[epoch, row] = pixel
        epochs[seed, workers] = seen
        for (epoch,row),image in seen.items():
            if row < 20: assert torch.equal(image, single(images[row:row+1], 0, (row + epoch) % 3, np.array([row]))[0])
            if epoch == 3: assert torch.equal(image, seen[0, row]) # the fourth epoch has the first one's views again
    same = epochs[1, 0]
    assert all(torch.equal(o[k], same[k]) for o in epochs.values() for k in same if k in o)

def test_epochs_go_on_by_themselves(data):
    dls = episodic_dls(data, n_episodes=2)
    first,second = ([x.clone() for x,_ in dls.train] for _ in range(2))
    assert not torch.equal(first[0], second[0]) and torch.equal(second[0], batches(episodic_dls(data, n_episodes=2), 1)[0][0])

def test_new_and_a_shared_compose_keep_the_randomness(data):
    compose = A.Compose([A.RandomCrop(8, 8), A.HorizontalFlip(p=.5)])
    dls = category_dls(data, bs=40, aug=compose)
    first = batches(dls, 2)
    dls.train.new(), next(iter(episodic_dls(data, aug=compose).train))
    assert equal(first, batches(dls, 2))

def test_images_that_fit_lie_on_the_device(data):
    "The same batches from a tensor that holds all images; too little room leaves them where they are"
    dls,held = category_dls(data, bs=40),category_dls(data, bs=40)
    images = held.train.packed
    n_bytes = 240*16*16*3
    images.hold(torch.device('cpu'), n_bytes - 1)
    assert images.resident is None
    images.hold(torch.device('cpu'), n_bytes)
    assert all(isinstance(o, torch.Tensor) and o.dtype == torch.uint8 for o in images.resident)
    assert equal(batches(dls), batches(held)) and torch.equal(held.valid.one_batch()[0], dls.valid.one_batch()[0])
    by_albumentations = category_dls(data, bs=40, aug=A.Compose([A.HorizontalFlip(p=.5)]))
    by_albumentations.train.packed.hold(torch.device('cpu'), n_bytes)
    assert equal(batches(by_albumentations), batches(category_dls(data, bs=40, aug=A.Compose([A.HorizontalFlip(p=.5)]))))

def test_loaders_share_one_copy_on_the_device_and_their_workers_do_without_it(data, monkeypatch):
    a,b = category_dls(data, bs=40).train,episodic_dls(data).train
    for dl in (a, b): dl.packed.hold(torch.device('cpu'), 2**30)
    assert a.packed.resident[0] is b.packed.resident[0]
    held = a.packed(np.arange(5))
    monkeypatch.setattr('grdd_fastai.data.loaders.get_worker_info', lambda: object()) # as in a worker process
    monkeypatch.setattr(a.packed, 'resident', [None]*len(a.packed.resident)) # a worker must not read the copy
    assert torch.equal(a.packed(np.arange(5)), held)

@pytest.mark.parametrize('n', [2, 3])
def test_the_shares_of_a_step_are_its_batch(data, n):
    alone,shares = category_dls(data, bs=24).train,[category_dls(data, bs=24).train.for_rank(r, n) for r in range(n)]
    for dl in (alone, *shares): dl.randomize()
    steps = np.array(alone.get_idxs())[:120].reshape(5, 24)
    mine = [np.array(dl.get_idxs()).reshape(5, 24//n) for dl in shares]
    assert all(len(dl) == len(alone) == 5 for dl in shares) and (np.concatenate(mine, 1) == steps).all()

def test_all_images_are_embedded_once_in_any_number_of_processes(data):
    dl = plain_dl(data, 'val', bs=32)
    parts = [[i for i in dl.new(share=(r, 3)).get_idxs()] for r in range(3)]
    assert (sorted(sum(parts, [])) == list(range(120)) and parts[1][:2] == [32, 33]
            and [len(dl.new(share=(r, 3))) for r in range(3)] == [2, 1, 1])
