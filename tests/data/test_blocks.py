"""DataBlocks: batches are the packed images with their labels."""
import albumentations as A
import numpy as np
import torch
from helpers import pixels

from grdd_fastai.data.blocks import category_dls, episode_block


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

def test_users_own_compose(data):
    x,_ = category_dls(data, bs=64, aug=A.Compose([A.CenterCrop(8, 8), A.InvertImg(p=1)])).one_batch()
    assert x.shape == (64, 3, 8, 8)
    assert torch.allclose(pixels(data, x).round()[0],
                          255 - pixels(data, category_dls(data, bs=64, aug=None).one_batch()[0]).round()[0, :, 4:12, 4:12], atol=1)

def test_block_is_a_fastai_datablock(data):
    dls = episode_block(data, n_way=2, k_shot=1, n_query=3, n_episodes=2).dataloaders(data, num_workers=0)
    assert dls.one_batch()[0].shape == (8, 3, 16, 16) and len(dls.train_ds) == 120
    x,y = dls.train_ds[25]
    assert (x.permute(1, 2, 0).numpy() == data.train.images[25]).all() and y == data.train.y[25]
