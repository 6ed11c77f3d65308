"""Training augmentation as a function of seed, epoch and row: a batch at a time on its device, or an image at a time by albumentations."""
import copy
import itertools
import random
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from ..core.errors import UserError

__all__ = ['AUGMENTATIONS', 'train_augmentation', 'BatchAugmentation', 'SeededAugmentation']


AUGMENTATIONS = ('batch', 'albumentations')
LOWEST,HIGHEST = 0.6,1.4 # the range of the factors of brightness, contrast and saturation
GREY = (0.299, 0.587, 0.114) # the weights of red, green and blue in a grey image
ORDERS = np.array(list(itertools.permutations(range(3)))) # all orders of brightness (0), contrast (1) and saturation (2)


def train_augmentation(px:int, jitter:bool=True, by:str='batch') -> Callable:
    """The augmentation of RFS and SKD for uint8 images: a crop after padding, colour `jitter` by up to 0.4 and a horizontal flip

    The padding is 4 at 32 px and 8 at 84 px. `by='batch'` gives a `BatchAugmentation`. `by='albumentations'` gives a `Compose`, which
    augments one image at a time in the same way and is many times slower.
    """
    known = ' or '.join(AUGMENTATIONS)
    if by not in AUGMENTATIONS: raise UserError(f'unknown augmentation {by!r}: it is {known}')
    pad = round(px / 32 * 4) if px < 84 else round(px / 84 * 8)
    if by == 'batch': return BatchAugmentation(pad, jitter)
    # This import takes a second, and most trainings do not need it.
    import albumentations as A
    colour = A.ColorJitter(*[(LOWEST, HIGHEST)]*3, hue=(0., 0.), p=1.)
    return A.Compose([A.PadIfNeeded(px + 2*pad, px + 2*pad), A.RandomCrop(px, px), *([colour] if jitter else []), A.HorizontalFlip(p=0.5)])

def seeded(aug):
    "The function of (images, seed, epoch, rows) that a loader calls: albumentations transforms are wrapped, anything else is returned"
    A = sys.modules.get('albumentations') # whoever made a transform of albumentations has imported it
    return SeededAugmentation(aug) if A and isinstance(aug, (A.BaseCompose, A.BasicTransform)) else aug


# ---- a batch at a time ------------------------------------------------------------------------------------------------

def _mix(x):
    "The finaliser of SplitMix64, uint64 -> uint64: each bit of the result depends on every bit of `x`"
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xbf58476d1ce4e5b9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94d049bb133111eb)
    return x ^ (x >> np.uint64(31))

def uniforms(seed, epoch, rows, n):
    """Draw `n` numbers from [0, 1) for each row as an array (B, n), which depends on the seed, the epoch and the row alone

    `epoch` is one for all rows, or an array (B) with one for each.
    """
    with np.errstate(over='ignore'):
        of_seed = _mix(np.array([seed], np.uint64) + np.uint64(1))
        key = _mix(np.asarray(rows, np.uint64) + _mix(np.asarray(epoch, np.uint64) + of_seed))
        x = _mix(key[:, None] + np.arange(1, n+1, dtype=np.uint64) * np.uint64(0x9e3779b97f4a7c15))
    return (x >> np.uint64(11)) * 2.**-53


class BatchAugmentation:
    """Augment a whole uint8 batch on its device: a crop after padding by `pad` pixels, a horizontal flip and colour `jitter`

    The jitter changes brightness, contrast and saturation by factors from [0.6, 1.4], in random order.
    """
    def __init__(self, pad:int, jitter:bool=True):
        self.pad = pad
        self.jitter = jitter

    def __call__(self, images:torch.Tensor, seed:int, epoch:int|np.ndarray, rows:np.ndarray) -> torch.Tensor:
        "Return the augmented uint8 images of `images` (B, 3, H, W), which are the images of `rows`"
        return self.apply(images, *(t.to(images.device) for t in self.numbers(seed, epoch, rows)))

    def numbers(self, seed:int, epoch:int|np.ndarray, rows:np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The random numbers of `rows`, one row each, which `apply` takes: those of many batches can be drawn at once

        The first tensor (B, 6) holds where the crop begins from the top and from the left, whether the image is flipped, and the order of
        brightness (0), contrast (1) and saturation (2). The second one (B, 3) holds their factors in this order.
        """
        u = uniforms(seed, epoch, rows, 7)
        order = ORDERS[(u[:, 6] * len(ORDERS)).astype(int)]
        factors = np.take_along_axis(LOWEST + (HIGHEST - LOWEST)*u[:, 3:6], order, 1)
        places = np.concatenate([(u[:, :2] * (2*self.pad + 1)).astype(int), u[:, 2:3] < 0.5, order], 1)
        return torch.from_numpy(places),torch.from_numpy(factors.astype(np.float32))

    def apply(self, images:torch.Tensor, places:torch.Tensor, factors:torch.Tensor) -> torch.Tensor:
        "Augment uint8 images (B, 3, H, W) by the `numbers` of their rows, which lie on the device of the images"
        images = crop_and_flip(images, *places[:, :3].T, self.pad)
        return jitter(images, factors, places[:, 3:]) if self.jitter else images


def crop_and_flip(images, top, left, flip, pad):
    """Pad images (B, 3, H, W) by `pad`, crop them to their old size and flip some of them horizontally

    `top` and `left` (B) in 0..2*pad say where each crop begins. `flip` (B) says which images are flipped.
    """
    H,W = images.shape[-2:]
    windows = F.pad(images, [pad]*4).unfold(2, H, 1).unfold(3, W, 1)[torch.arange(len(images), device=images.device), :, top, left]
    return torch.where(flip.bool().view(-1, 1, 1, 1), windows.flip(-1), windows)

def jitter(images, factors, order):
    """Change the colours of uint8 images (B, 3, H, W) in three steps by `factors` (B, 3)

    `order` (B, 3) says what each step changes: brightness (0), contrast (1) or saturation (2). A step returns f*image + (1-f)*other.
    `other` is black for brightness, the mean grey for contrast and the grey image for saturation, as in torchvision's adjust_brightness,
    adjust_contrast and adjust_saturation.
    """
    # The colour planes are kept apart, (3, B, HW), because this is the fastest layout on a CPU.
    x = images.movedim(1, 0).contiguous().flatten(2).float()
    for f,kind in zip(factors.T[..., None], order.T[..., None]): # (B, 1) each
        grey = (GREY[0]*x[0]).add_(x[1], alpha=GREY[1]).add_(x[2], alpha=GREY[2])
        # Blend with black, with the mean grey or with the grey image.
        other = torch.where(kind == 1, grey.mean(1, keepdim=True), grey).mul_((kind > 0) * (1 - f))
        x.mul_(f).add_(other).clamp_(0, 255)
    return x.round_().to(torch.uint8).view(3, *images.movedim(1, 0).shape[1:]).movedim(0, 1)


# ---- an image at a time -----------------------------------------------------------------------------------------------

class SeededAugmentation:
    "Apply an albumentations `compose` to each image with a random state that depends on the seed, the epoch and the row"
    def __init__(self, compose):
        self.compose = copy.deepcopy(compose) # the user's own compose keeps its random state
        self.bits = np.random.Philox(0)
        self.py_random = random.Random()
        self.state = self.bits.state
        self.compose.set_random_state(np.random.Generator(self.bits), self.py_random)

    def __call__(self, images, seed, epoch, rows):
        "Return the augmented uint8 images of `images` (B, 3, H, W), which are the images of `rows`"
        epochs = np.broadcast_to(epoch, len(rows))
        images = images.movedim(1, -1).cpu().numpy()
        out = np.stack([self.one(im, seed, int(e), row) for im,e,row in zip(images, epochs, rows, strict=True)])
        return torch.from_numpy(out).movedim(-1, 1)

    def one(self, image, seed, epoch, row):
        "Augment one image (H, W, 3) of `row`"
        # Philox is counter-based. With the seed and the row as its key and the epoch as its counter, no earlier state has to be computed.
        state = self.state['state']
        state['key'][:] = (seed, row)
        state['counter'][:] = (0, 0, 0, epoch)
        self.state.update(buffer_pos=4, has_uint32=0)
        self.bits.state = self.state
        self.py_random.seed(f'{seed} {epoch} {row}')
        return self.compose(image=image)['image']
