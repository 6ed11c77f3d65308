"""Training augmentation by albumentations, a function of seed, epoch and row."""
import copy
import random

import albumentations as A
import numpy as np
import torch

__all__ = ['train_augmentation', 'SeededAugmentation']


def train_augmentation(px, jitter=True):
    "RFS's and SKD's: crop after padding (4 at 32 px, 8 at 84 px), colour `jitter` 0.4, horizontal flip; for uint8 images"
    pad = round(px / 32 * 4) if px < 84 else round(px / 84 * 8)
    colour = A.ColorJitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4), hue=(0., 0.), p=1.)
    return A.Compose([A.PadIfNeeded(px + 2*pad, px + 2*pad), A.RandomCrop(px, px), *([colour] if jitter else []), A.HorizontalFlip(p=0.5)])


class SeededAugmentation:
    "Apply an albumentations `compose` to each image from a random state of its own"
    def __init__(self, compose):
        self.compose,self.bits,self.py_random = copy.deepcopy(compose),np.random.Philox(0),random.Random() # the user's keeps its own state
        self.state = self.bits.state
        self.compose.set_random_state(np.random.Generator(self.bits), self.py_random)

    def __call__(self, images, seed, epoch, rows):
        "uint8 images (B, 3, H, W) of `rows` -> the same, augmented"
        out = np.stack([self.one(im, seed, epoch, row) for im,row in zip(images.movedim(1, -1).numpy(), rows)])
        return torch.from_numpy(out).movedim(-1, 1)

    def one(self, image, seed, epoch, row):
        # Philox is counter-based: with seed and row as its key and the epoch as its counter a state costs nothing to reach
        state = self.state['state']
        state['key'][:],state['counter'][:] = (seed, row),(0, 0, 0, epoch)
        self.state.update(buffer_pos=4, has_uint32=0)
        self.bits.state = self.state
        self.py_random.seed(f'{seed} {epoch} {row}')
        return self.compose(image=image)['image']
