"""Features: those of the network on each normalised image, kept on disk, and of augmented views."""
import random

import numpy as np
import pytest
import timm
import torch
from helpers import like_data
from naive import naive_embed

from grdd_fastai.data.augment import train_augmentation
from grdd_fastai.data.blocks import category_dls, plain_dl
from grdd_fastai.data.loaders import view_of
from grdd_fastai.fewshot.embed import cached_features, embed, view_features
from grdd_fastai.models.create import create_backbone, features
from grdd_fastai.models.pretrained import load_network


def test_embed_is_the_network_on_each_normalised_image(data):
    net = create_backbone('convnet4', 7, 16).train()
    h,y = embed(net, plain_dl(data, 'val', bs=50))
    assert net.training and (y.numpy() == data.val.y).all() and h.shape == (len(data.val), 64)
    net.reset_classifier(0)
    for i in (0, 63, len(data.val)-1):
        x = torch.tensor(data.val.images[i]).permute(2, 0, 1)[None]
        assert torch.allclose(naive_embed(net, x, data.stats)[0], h[i], atol=1e-4)

def test_mirrored_features_are_the_mean_of_both(data, tmp_path):
    net = like_data(create_backbone('convnet4', 0, 16, 1), data)
    images = torch.from_numpy(np.array(data.val.images)).movedim(-1, 1)
    want = (naive_embed(net, images, data.stats) + naive_embed(net, images.flip(3), data.stats))/2
    assert torch.allclose(embed(net, plain_dl(data, 'val'), mirror=True)[0], want, atol=1e-4)
    plain,mirrored = (cached_features(net, data, 'val', cache=tmp_path, mirror=m)[0] for m in (False, True))
    assert torch.allclose(mirrored, want, atol=1e-4) and not torch.allclose(plain, mirrored, atol=1e-2)
    assert torch.equal(cached_features(net, data, 'val', cache=tmp_path)[0], plain)

def test_features_are_embedded_once(two_nets, faint_data, tmp_path, monkeypatch):
    net = load_network(two_nets/'student_cl')
    h,y = cached_features(net, faint_data, 'test', cache=tmp_path)
    assert torch.allclose(h, embed(net, plain_dl(faint_data, 'test'))[0], atol=1e-5) and (y.numpy() == faint_data.test.y).all()
    monkeypatch.setattr('grdd_fastai.fewshot.embed.embed', lambda *_, **__: pytest.fail('embedded again'))
    assert torch.equal(cached_features(net, faint_data, 'test', cache=tmp_path)[0], h)
    other = load_network(two_nets/'student_cl')
    other.pretrained_cfg = other.pretrained_cfg | dict(mean=(.5,.5,.5))
    for change in (dict(split='val'), dict(net=other), dict(views=2), dict(net=load_network(two_nets/'student_grdd'))):
        with pytest.raises(pytest.fail.Exception): cached_features(**dict(net=net, data=faint_data, split='test', cache=tmp_path) | change)

def test_a_damaged_feature_file_is_made_again(two_nets, faint_data, tmp_path):
    net = load_network(two_nets/'student_cl')
    h = cached_features(net, faint_data, 'test', cache=tmp_path)[0].clone() # not the file's own memory
    path, = (tmp_path/'features').glob('*.npy')
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    assert torch.equal(cached_features(net, faint_data, 'test', cache=tmp_path)[0], h)

def test_views_are_training_augmentations_of_the_image(two_nets, faint_data, tmp_path):
    net = load_network(two_nets/'student_cl')
    clean,_ = cached_features(net, faint_data, 'test', cache=tmp_path)
    a,b,other = (cached_features(net, faint_data, 'test', views=n, seed=seed, cache=tmp_path)[0] for n,seed in ((2, 0), (3, 0), (2, 1)))
    assert a.shape == (2, *clean.shape) and torch.equal(a, b[:2]) and not torch.equal(a[0], a[1]) and not torch.equal(a, other)
    aug,images = train_augmentation(32),torch.from_numpy(np.array(faint_data.test.images)).movedim(-1, 1)
    for v in range(2):
        h = naive_embed(net, aug(images, 0, v, range(len(images))), faint_data.stats)
        assert torch.allclose(a[v], h, atol=1e-4)

def test_known_views_are_those_of_a_loader_with_views(data, tmp_path):
    "By the network itself on what the loader gives, over the epochs in which all views come once"
    net = like_data(create_backbone('convnet4', 0, 16, 1), data)
    known = view_features(net, data, 3, cache=tmp_path, amp=False)
    assert known.shape == (3, len(data.train), 64) and len(known) == len(data.train) and known.arrays[0].dtype == np.float16
    dl = category_dls(data, bs=40, seed=5, views=3).train
    seen = set()
    for epoch in range(3):
        rows = None
        for i,(x,_) in enumerate(dl):
            if rows is None: rows = [dl.rows[j] for j in dl_order(dl)]
            mine = np.array(rows[40*i:40*i + len(x)])
            views = view_of(mine, epoch, 3)
            seen |= set(zip(views, mine, strict=True))
            with torch.no_grad(): h = features(net.eval(), x.as_subclass(torch.Tensor))
            assert torch.allclose(known.of(views, mine), h, atol=2e-3*float(h.abs().max()))
    assert len(seen) == 3*len(data.train)

def dl_order(dl):
    "The order of the epoch that `dl` is in"
    return random.Random(f'{dl.seed} {dl.epoch}').sample(range(dl.n), dl.n)

def test_views_are_computed_once_and_go_on_where_they_were_stopped(data, tmp_path, monkeypatch):
    net,passes = like_data(create_backbone('convnet4', 0, 16, 1), data),[]
    monkeypatch.setattr('grdd_fastai.fewshot.embed.embed', lambda *args, **kwargs: passes.append(1) or embed(*args, **kwargs))
    said = []
    def time_is_up(made):
        said.append(made)
        if len(passes) == 2: raise KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt): view_features(net, data, 4, cache=tmp_path, after_each=time_is_up)
    four = view_features(net, data, 4, cache=tmp_path, after_each=said.append)
    assert said == [True, True, False, False, True, True]
    two = view_features(net, data, 2, cache=tmp_path)
    assert len(passes) == 4 and all((a == b).all() for a,b in zip(two.arrays, four.arrays, strict=False))
    assert not (four.arrays[0] == four.arrays[1]).all()
    view_features(net, data, 2, jitter=False, cache=tmp_path)
    view_features(like_data(create_backbone('convnet4', 0, 16, 2), data), data, 1, cache=tmp_path)
    assert len(passes) == 4 + 2 + 1

def test_images_are_normalised_as_the_network_wants_them(faint_data, cache):
    "Its own mean and standard deviation, not the data's, by hand"
    net = timm.create_model('convnet4', num_classes=0)
    net.pretrained_cfg = net.pretrained_cfg | dict(mean=(.1, .2, .3), std=(.4, .5, .6))
    h = naive_embed(net, torch.from_numpy(np.array(faint_data.test.images)).movedim(-1, 1), ((.1, .2, .3), (.4, .5, .6)))
    assert torch.allclose(cached_features(net, faint_data, 'test', cache=cache)[0], h, atol=1e-4)
