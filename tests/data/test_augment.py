"""Training augmentation: what it does to an image, what decides it, and that both kinds do the same."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from naive import naive_crop_and_flip, naive_jitter
from scipy.stats import chisquare, ks_2samp, kstest

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.augment import AUGMENTATIONS, ORDERS, BatchAugmentation, crop_and_flip, jitter, seeded, train_augmentation, uniforms
from grdd_fastai.data.blocks import category_dls


def images(n, px=32, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, px, px, 3), dtype=np.uint8)).movedim(-1, 1)

def smooth(n, px=32, seed=0):
    "Photo-like: colours that change slowly, dark and bright ones"
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.interpolate(torch.rand(n, 3, 4, 4, generator=g), (px, px), mode='bicubic').clamp(0, 1)
    return (x*255).to(torch.uint8)

both = pytest.mark.parametrize('by', AUGMENTATIONS)


@both
def test_of_a_row_it_does_not_depend_on_the_batch(data, by):
    aug,x = seeded(train_augmentation(16, by=by)),torch.tensor(data.train.images[:4]).permute(0, 3, 1, 2)
    together = aug(x, 1, 5, np.arange(4))
    assert torch.equal(together[2:3], aug(x[2:3], 1, 5, np.array([2])))
    assert (not torch.equal(together[2:3], aug(x[2:3], 1, 6, np.array([2])))
            and not torch.equal(together[2:3], aug(x[2:3], 2, 5, np.array([2]))))

@both
@pytest.mark.parametrize('px, pad', [(32, 4), (84, 8)])
def test_it_crops_flips_and_jitters(by, px, pad):
    "A white image shows the padding, a split one the flip, a grey one the jitter"
    aug,rows = seeded(train_augmentation(px, by=by)),np.arange(600)
    def constant(v): return torch.full((600, 3, px, px), v, dtype=torch.uint8)
    half = constant(0)
    half[..., px//2:] = 200
    margin = (aug(constant(255), 0, 0, rows).float().mean(1) == 0).all(2).sum(1) # rows of padding
    assert set(margin.tolist()) == set(range(pad+1))
    out = aug(half, 0, 0, rows).float().mean(1)[:, pad:px-pad]
    flipped = out[:, :, px//4].mean(1) > out[:, :, px-px//4].mean(1)
    assert .43 < flipped.float().mean() < .57
    bright = aug(constant(100), 0, 0, rows)[:, 0, px//2, px//2].float()
    assert 54 <= bright.min() < 70 and 130 < bright.max() <= 154 # the padding, up to 23%, takes part in the contrast's mean
    plain = seeded(train_augmentation(px, jitter=False, by=by))(constant(100), 0, 0, rows)
    assert set(plain.unique().tolist()) == {0, 100}

def test_both_agree_in_distribution():
    "Of the same images 6,000 views each, in what the eye would measure: brightness, contrast, saturation, corners, edges"
    x,n = smooth(30).repeat(200, 1, 1, 1),6000
    def measures(by, seed):
        v = seeded(train_augmentation(32, by=by))(x, seed, 0, np.arange(n)).float()
        grey = v.mean(1)
        return dict(brightness=grey.mean((1, 2)), contrast=grey.std((1, 2)), saturation=(v.amax(1) - v.amin(1)).mean((1, 2)),
                    red=v[:, 0].mean((1, 2)), highest=v.amax((1, 2, 3)),
                    corner=v[:, :, 0, 0].mean(1), balance=grey[:, :, :16].mean((1, 2)) - grey[:, :, 16:].mean((1, 2)),
                    top=(grey == 0).all(2).sum(1), left=(grey == 0).all(1).sum(1))
    ours,theirs,other = measures('batch', 0),measures('albumentations', 0),measures('batch', 1)
    for k in ours: assert ks_2samp(ours[k].numpy(), theirs[k].numpy()).pvalue > 1e-3, k
    weak = seeded(BatchAugmentation(4))(x, 0, 0, np.arange(n)).float()*0.97 # the test sees a difference of three percent
    assert ks_2samp(weak.mean((1, 2, 3)).numpy(), theirs['brightness'].numpy()).pvalue < 1e-3
    assert not torch.equal(ours['brightness'], other['brightness'])

def test_crop_and_flip_is_a_slice_of_the_padded_image():
    x,rng = images(40),np.random.default_rng(1)
    top,left,flip = rng.integers(0, 9, 40),rng.integers(0, 9, 40),rng.integers(0, 2, 40)
    out = crop_and_flip(x, *map(torch.from_numpy, (top, left, flip)), 4)
    for im,o,i,j,f in zip(x.numpy(), out.numpy(), top, left, flip):
        assert (o == naive_crop_and_flip(im, i, j, f, 32, 4)).all()

def test_jitter_is_torchvisions():
    "adjust_brightness, adjust_contrast and adjust_saturation in turn, of float images: of uint8 ones they cut off after each"
    x,rng = smooth(60),np.random.default_rng(2)
    factors,order = rng.uniform(.6, 1.4, (60, 3)).astype(np.float32),ORDERS[rng.integers(0, 6, 60)]
    out = jitter(x, torch.from_numpy(factors), torch.from_numpy(order))
    for im,o,fs,kinds in zip(x, out, factors, order): assert (naive_jitter(im, fs, kinds) - o).abs().max() <= .51 + .05

def test_draws_are_uniform_and_independent():
    u = uniforms(3, 5, np.arange(20_000), 7)
    assert u.shape == (20_000, 7) and all(kstest(c, 'uniform').pvalue > 1e-3 for c in u.T)
    assert np.abs(np.corrcoef(u.T) - np.eye(7)).max() < .03 and abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < .03
    for other in (uniforms(4, 5, np.arange(20_000), 7), uniforms(3, 6, np.arange(20_000), 7), uniforms(5, 3, np.arange(20_000), 7)):
        assert abs(np.corrcoef(u[:, 0], other[:, 0])[0, 1]) < .03
    assert chisquare(np.bincount((u[:, 6]*6).astype(int), minlength=6)).pvalue > 1e-3
    assert ((uniforms(3, 5, np.array([7, 3]), 4) == uniforms(3, 5, np.arange(10), 4)[[7, 3]]).all()
            and (uniforms(2**32 - 1, 0, np.array([0]), 1) < 1).all())

def test_on_the_loaders_device_and_on_workers_it_is_the_same(data):
    "A loader hands a function its images; `device` is where they are then"
    seen = []
    def look(x, seed, epoch, rows):
        seen.append((x.device.type, x.dtype, len(rows)))
        return 255 - x
    x,_ = category_dls(data, bs=40, aug=look, device=torch.device('cpu')).one_batch()
    assert seen[-1] == ('cpu', torch.uint8, 40) and x.shape == (40, 3, 16, 16)

def test_an_unknown_kind_is_one_sentence():
    with pytest.raises(UserError, match="unknown augmentation 'torchvision': it is batch or albumentations"):
        train_augmentation(32, by='torchvision')


# ---- albumentations is imported only where it is used -----------------------------------------------------------------

def python(code, **env):
    "What `code` prints in a fresh process, with the environment variables `env` changed; None removes one"
    env = {k:v for k,v in {**os.environ, **env}.items() if v is not None}
    return subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout.strip()

def test_the_library_does_not_import_albumentations():
    assert python('import sys, grdd_fastai.all; print("albumentations" in sys.modules)') == 'False'

def test_albumentations_is_imported_by_its_name():
    code = '''
import sys
from grdd_fastai.data.augment import SeededAugmentation, seeded, train_augmentation
plain = train_augmentation(32)
assert seeded(plain) is plain and seeded(None) is None and 'albumentations' not in sys.modules
compose = train_augmentation(32, by='albumentations')
print(type(seeded(compose)) is SeededAugmentation, 'albumentations' in sys.modules)
'''
    assert python(code) == 'True True'

def test_a_compose_and_a_transform_of_ones_own_are_seeded():
    import albumentations as A

    from grdd_fastai.data.augment import SeededAugmentation, seeded
    x,rows = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8),np.arange(6)
    for mine in (A.Compose([A.HorizontalFlip(p=.5)]), A.HorizontalFlip(p=.5)):
        aug = seeded(mine)
        assert isinstance(aug, SeededAugmentation) and torch.equal(aug(x, 0, 1, rows), aug(x, 0, 1, rows))
    def function(images, seed, epoch, rows): return images
    assert seeded(function) is function
