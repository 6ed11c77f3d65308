"""Training augmentation, a function of seed, epoch and row: a batch at once on its device, or an image at a time by albumentations."""
import copy
import itertools
import random

import albumentations as A
import numpy as np
import torch
import torch.nn.functional as F

from ..core.errors import UserError

__all__ = ['AUGMENTATIONS', 'train_augmentation', 'BatchAugmentation', 'SeededAugmentation']


AUGMENTATIONS = ('batch', 'albumentations')
LOWEST,HIGHEST = 0.6,1.4 # factors of brightness, contrast and saturation
GREY = (0.299, 0.587, 0.114) # of red, green and blue
ORDERS = np.array(list(itertools.permutations(range(3)))) # in which brightness (0), contrast (1) and saturation (2) follow each other


def train_augmentation(px, jitter=True, by='batch'):
    """RFS's and SKD's: crop after padding (4 at 32 px, 8 at 84 px), colour `jitter` 0.4, horizontal flip; for uint8 images

    `by='batch'` is a `BatchAugmentation`, `by='albumentations'` a `Compose` that does the same an image at a time, many times slower.
    """
    if by not in AUGMENTATIONS: raise UserError(f'unknown augmentation {by!r}: it is {" or ".join(AUGMENTATIONS)}')
    pad = round(px / 32 * 4) if px < 84 else round(px / 84 * 8)
    if by == 'batch': return BatchAugmentation(pad, jitter)
    colour = A.ColorJitter(*[(LOWEST, HIGHEST)]*3, hue=(0., 0.), p=1.)
    return A.Compose([A.PadIfNeeded(px + 2*pad, px + 2*pad), A.RandomCrop(px, px), *([colour] if jitter else []), A.HorizontalFlip(p=0.5)])

def seeded(aug):
    "What a loader calls as (images, seed, epoch, rows): an albumentations `Compose` with random states of its own, anything else as it is"
    return SeededAugmentation(aug) if isinstance(aug, (A.BaseCompose, A.BasicTransform)) else aug


# ---- a batch at once --------------------------------------------------------------------------------------------------

def _mix(x):
    "SplitMix64's finaliser: uint64 -> uint64, each bit of it depending on every one of x"
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xbf58476d1ce4e5b9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94d049bb133111eb)
    return x ^ (x >> np.uint64(31))

def uniforms(seed, epoch, rows, n):
    "`n` numbers from [0, 1) for each row, (B, n): functions of seed, epoch and row alone"
    keys = np.array([seed, epoch], np.uint64)
    with np.errstate(over='ignore'):
        key = _mix(np.asarray(rows, np.uint64) + _mix(keys[1:] + _mix(keys[:1] + np.uint64(1))))
        x = _mix(key[:, None] + np.arange(1, n+1, dtype=np.uint64) * np.uint64(0x9e3779b97f4a7c15))
    return (x >> np.uint64(11)) * 2.**-53


class BatchAugmentation:
    """Crop after padding by `pad`, horizontal flip and, with `jitter`, brightness, contrast and saturation by factors from [0.6, 1.4]
    in random order: of a whole uint8 batch, on its device"""
    def __init__(self, pad, jitter=True): self.pad,self.jitter = pad,jitter

    def __call__(self, images, seed, epoch, rows):
        "uint8 images (B, 3, H, W) of `rows` -> the same, augmented"
        u = uniforms(seed, epoch, rows, 7)
        order = ORDERS[(u[:, 6] * len(ORDERS)).astype(int)]
        factors = np.take_along_axis(LOWEST + (HIGHEST - LOWEST)*u[:, 3:6], order, 1)
        places = np.concatenate([(u[:, :2] * (2*self.pad + 1)).astype(int), u[:, 2:3] < 0.5, order], 1)
        places,factors = (torch.from_numpy(a).to(images.device) for a in (places, factors.astype(np.float32)))
        images = crop_and_flip(images, *places[:, :3].T, self.pad)
        return jitter(images, factors, places[:, 3:]) if self.jitter else images


def crop_and_flip(images, top, left, flip, pad):
    "Windows of images (B, 3, H, W) padded by `pad`: `top` and `left` (B) in 0..2*pad, turned left to right where `flip` (B)"
    H,W = images.shape[-2:]
    windows = F.pad(images, [pad]*4).unfold(2, H, 1).unfold(3, W, 1)[torch.arange(len(images), device=images.device), :, top, left]
    return torch.where(flip.bool().view(-1, 1, 1, 1), windows.flip(-1), windows)

def jitter(images, factors, order):
    """Colours of uint8 images (B, 3, H, W) changed in three turns by `factors` (B, 3)

    `order` (B, 3) says what each turn changes: brightness (0), contrast (1) or saturation (2).

    Each is f * image + (1 - f) * other, of black, the mean of its grey image, its grey image; as torchvision's adjust_brightness, ...
    """
    # (3, B, HW): the planes apart, the fastest on a CPU
    x = images.movedim(1, 0).contiguous().flatten(2).float()
    for f,kind in zip(factors.T[..., None], order.T[..., None]):                          # (B, 1)
        grey = (GREY[0]*x[0]).add_(x[1], alpha=GREY[1]).add_(x[2], alpha=GREY[2])
        other = torch.where(kind == 1, grey.mean(1, keepdim=True), grey).mul_((kind > 0) * (1 - f))
        x.mul_(f).add_(other).clamp_(0, 255)
    return x.round_().to(torch.uint8).view(3, *images.movedim(1, 0).shape[1:]).movedim(0, 1)


# ---- an image at a time -----------------------------------------------------------------------------------------------

class SeededAugmentation:
    "Apply an albumentations `compose` to each image from a random state of its own"
    def __init__(self, compose):
        self.compose,self.bits,self.py_random = copy.deepcopy(compose),np.random.Philox(0),random.Random() # the user's keeps its own state
        self.state = self.bits.state
        self.compose.set_random_state(np.random.Generator(self.bits), self.py_random)

    def __call__(self, images, seed, epoch, rows):
        "uint8 images (B, 3, H, W) of `rows` -> the same, augmented"
        out = np.stack([self.one(im, seed, epoch, row) for im,row in zip(images.movedim(1, -1).cpu().numpy(), rows)])
        return torch.from_numpy(out).movedim(-1, 1)

    def one(self, image, seed, epoch, row):
        # Philox is counter-based: with seed and row as its key and the epoch as its counter a state costs nothing to reach
        state = self.state['state']
        state['key'][:],state['counter'][:] = (seed, row),(0, 0, 0, epoch)
        self.state.update(buffer_pos=4, has_uint32=0)
        self.bits.state = self.state
        self.py_random.seed(f'{seed} {epoch} {row}')
        return self.compose(image=image)['image']
