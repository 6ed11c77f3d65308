"""Packed splits as fastai items, and a DataLoader whose order and augmentation depend only on the seed."""
import copy
import random
from functools import cached_property
from pathlib import Path
from weakref import WeakValueDictionary

import fastai.vision.data  # noqa: F401  (registers show_batch for images)
import numpy as np
import torch
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.transforms import Categorize, Category, CategoryMap
from fastai.torch_core import TensorCategory, TensorImage
from fasttransform import DisplayedTransform, Pipeline
from PIL import Image
from torch.utils.data import get_worker_info

from ..core.device import free_memory, sent
from ..core.errors import UserError, first_line
from ..core.storage import read_bytes
from .augment import seeded
from .images import decode, square, upright_rgb

__all__ = ['PackedImage', 'PackedLabel', 'view_of', 'SeededDL', 'classes_of', 'plain_images', 'FewShotDataLoaders']


# ---- packed splits as fastai items ------------------------------------------------------------------------------------

class PackedImage(DisplayedTransform):
    "Row number, or rows of one split -> uint8 image(s) (..., 3, H, W); the rows of `splits` are numbered one split after the other"
    def __init__(self, *splits):
        self.images = [s.images for s in splits]
        self.px = self.images[0].shape[1]
        self.crop = splits[0].crop # how the images became squares, in timm's words
        self.resident = None # copies of the images on a device, made by `hold`
        self.starts = np.cumsum([0] + [len(s) for s in splits]) # first row of each split
    def encodes(self, rows): return self.read(*self.located(np.asarray(rows)))
    def located(self, rows):
        "(images, rows): the stored images (N, H, W, 3) of the split in which all `rows` lie, and the rows' numbers there"
        i = np.searchsorted(self.starts, rows.flat[0], 'right') - 1
        # worker processes cannot read GPU memory
        images = (self.images if self.resident is None or get_worker_info() else self.resident)[i]
        return images,rows - self.starts[i]
    @staticmethod
    def read(images, rows):
        "The images of `rows`, an array or a tensor on the device of `images`"
        x = (images[torch.as_tensor(rows, device=images.device)] if isinstance(images, torch.Tensor)
             else torch.from_numpy(np.array(images[rows])))
        return TensorImage(x.movedim(-1, -3))
    def hold(self, device, room):
        """Keep a copy of the images on `device` if they need at most `room` bytes in total

        Loaders of the same images share the copy, so that images which are there already need no room.
        """
        if self.resident is None and sum(im.nbytes for im in self.images if resident_key(im, device) not in RESIDENT) <= room:
            self.resident = [resident_copy(im, device) for im in self.images]
    def emptied(self):
        "A copy without images"
        new = copy.copy(self)
        new.images,new.resident = [im[:0].copy() for im in self.images],None
        return new
    def __getstate__(self): return self.__dict__ | dict(resident=None) # a copied or pickled loader makes its own copy of the images

RESIDENT = WeakValueDictionary() # (id of the images, device) -> their copy on the device, shared by all loaders of this process

def resident_key(images, device): return id(images),str(device) # a loader with a copy also holds the images, so their id stays unique

def resident_copy(images, device):
    "A copy on `device` of `images` (an array or a tensor); while a loader uses the copy, every other loader gets the same one"
    key = resident_key(images, device)
    copy = RESIDENT.get(key)
    if copy is None:
        copy = (torch.from_numpy(np.array(images)) if isinstance(images, np.ndarray) else images).to(device)
        RESIDENT[key] = copy
    return copy

class PackedLabel(DisplayedTransform):
    "Row number(s) -> class code(s); the classes of the first split have the lowest codes and `c` is their number"
    def __init__(self, *splits):
        n_before = np.cumsum([0] + [len(s.vocab) for s in splits])
        self.y = np.concatenate([s.y + n for s,n in zip(splits, n_before)])
        self.vocab = CategoryMap([c for s in splits for c in s.vocab], sort=False) # fastai takes a list for the vocabs of several targets
        self.c = len(splits[0].vocab)
    def encodes(self, rows): return TensorCategory(torch.as_tensor(self.y[np.asarray(rows)]))
    def decodes(self, o:TensorCategory): return Category(self.vocab[int(o)])
    def emptied(self):
        "A copy without labels; the vocabulary stays"
        new = copy.copy(self)
        new.y = self.y[:0].copy()
        return new


# ---- loaders ----------------------------------------------------------------------------------------------------------

BLOCK = 2**14 # images whose rows, labels and random numbers go to the device at once

VIEWS_SEED = 0 # of all views, so that trainings of all seeds see the same ones

def view_of(rows, epoch, views):
    "The view, 0..`views`-1, that each of `rows` has in an epoch: an image has all its views one epoch after the other"
    return (np.asarray(rows) + epoch) % views

class SeededDL(TfmdDL):
    """A `TfmdDL` whose order and augmentation depend only on `seed`, epoch and row, for any number of workers

    `epoch` counts the iterations that have begun; our Learners set it. Packed splits are read a whole batch at a time, and any other fastai
    dataset item by item. `aug` augments packed images: it is an albumentations `Compose`, or a function of (uint8 images, seed, epoch,
    rows) such as `BatchAugmentation`, which runs on the loader's device if there are no workers. One with methods `numbers` and `apply`, as
    `BatchAugmentation` has them, draws the random numbers of many batches at once. Images that fit into a quarter of a GPU's free
    memory stay there. With `views`, an image has this number of different augmented views and no more, so that what a network makes of
    them can be computed once; `aug` then gets an array with the view of each row as its epoch (`view_of`). `share` is (rank, world): of
    each world * bs items, this loader gives the bs items of its rank. UserError for arguments that are out of range.
    """
    def __init__(self, dataset, bs=64, seed=0, aug=None, share=(0, 1), views=None, **kwargs):
        if not isinstance(bs, int | np.integer | type(None)) or (bs is not None and bs < 1):
            raise UserError(f'a batch of {bs!r} images: it must be at least 1')
        if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
            raise UserError(f'the seed is {seed!r}: give a whole number, 0 or more')
        if aug is not None and not callable(aug): raise UserError(f'aug is {aug!r}: give an albumentations Compose, a function or None')
        if views is not None and not (isinstance(views, int | np.integer) and views > 0):
            raise UserError(f'views is {views!r}: give a whole number, at least 1')
        self.seed,self.aug,self.share,self.views = seed,aug,share,views
        self.epoch = -1
        self.augment = seeded(aug)
        super().__init__(dataset, bs=bs, **kwargs)

    def new(self, dataset=None, cls=None, **kwargs):
        return super().new(dataset, cls, **{**dict(seed=self.seed, aug=self.aug, share=self.share, views=self.views), **kwargs})

    def for_rank(self, rank, world):
        "The loader of process `rank` of `world`: an equal part of each step"
        return self.new(bs=max(1, self.bs//world), share=(rank, world), drop_last=True)

    def plain(self, bs=256):
        "A loader that gives every item once, in order and not augmented"
        return self.new(cls=SeededDL, aug=None, views=None, bs=bs, shuffle=False, drop_last=False)

    @cached_property
    def packed(self):
        "The `PackedImage` of the dataset, or None if the dataset is not packed"
        return next((f for f in self.dataset.tls[0].tfms.fs if isinstance(f, PackedImage)), None)
    @cached_property
    def rows(self): return np.asarray(list(self.dataset.items))
    def labels(self):
        "Class codes (N) of all items of the dataset"
        return self.dataset.tls[-1].tfms(self.rows).numpy() if self.packed else classes_of(self)[0]

    def randomize(self):
        self.epoch += 1
        self.rng = random.Random(f'{self.seed} {self.epoch}')

    def before_iter(self):
        super().before_iter()
        room = free_memory(self.device) if self.packed and self.on_device else None
        if room is not None: self.packed.hold(self.device, room//4)

    @property
    def on_device(self):
        "Whether batches are made in this process, on the loader's device"
        return self.device is not None and self.fake_l.num_workers == 0

    def get_idxs(self): return self.rank_idxs(super().get_idxs(), self.drop_last)
    def rank_idxs(self, idxs, whole):
        "The part of `idxs` for this rank: the processes take turns with `bs` items each; `whole` leaves out an incomplete last step"
        rank,world = self.share
        if world == 1: return idxs
        step = world*self.bs
        end = len(idxs)//step*step if whole else len(idxs)
        return [i for at in range(rank*self.bs, end, step) for i in idxs[at:at+self.bs]]
    def __len__(self):
        rank,world = self.share
        if world == 1: return super().__len__()
        return self.n//(world*self.bs) if self.drop_last else len(range(rank*self.bs, self.n, world*self.bs))

    def create_batches(self, samps):
        if self.by_blocks:
            idxs = np.fromiter(samps, np.int64)
            end = len(idxs)//self.bs*self.bs if self.drop_last else len(idxs)
            step = max(1, BLOCK//self.bs)*self.bs
            for at in range(0, end, step): yield from self.batches_of(self.rows[idxs[at:min(at + step, end)]])
        else: yield from super().create_batches(samps)

    @property
    def by_blocks(self):
        "Whether what many batches need can be made at once: images are packed and no more, and batches are made on the loader's device"
        if self.prebatched or not (self.packed and self.on_device): return False
        return all(f is self.packed or f.name == 'noop' for f in self.dataset.tls[0].tfms.fs) # a DataBlock adds noop

    def batches_of(self, rows):
        "The batches of consecutive `rows`; all that does not depend on pixels is made and sent to the device before the first one"
        images,places = self.packed.located(rows)
        if isinstance(images, torch.Tensor): places = torch.from_numpy(places).to(images.device)
        y = self.dataset.tls[1].tfms(rows).to(self.device)
        drawn = hasattr(self.augment, 'numbers')
        numbers = [t.to(self.device) for t in self.augment.numbers(*self.draw_of(rows), rows)] if drawn else []
        for at in range(0, len(rows), self.bs):
            part = slice(at, at + self.bs)
            x = sent(self.packed.read(images, places[part]), self.device)
            yield self.augmented(x, rows[part], [t[part] for t in numbers]),y[part]

    def augmented(self, x, rows, numbers=()):
        "The images `x` of `rows`, augmented; `numbers` are those that the augmentation drew for these rows, if it drew them before"
        if not self.augment: return x
        x = x.as_subclass(torch.Tensor)
        return TensorImage(self.augment.apply(x, *numbers) if numbers else self.augment(x, *self.draw_of(rows), rows))

    def draw_of(self, rows):
        "(seed, epoch) of the augmentation of `rows`; with `views`, the view of each row takes the place of the epoch"
        epoch = max(self.epoch, 0)
        return (self.seed, epoch) if self.views is None else (VIEWS_SEED, view_of(rows, epoch, self.views))

    def do_item(self, i): return (i or 0) if self.packed else super().do_item(i)
    def do_batch(self, b):
        if not self.packed: return super().do_batch(b)
        rows = self.rows[np.asarray(b)]
        x,y = (tl.tfms(rows) for tl in self.dataset.tls)
        if self.on_device: x = x.to(self.device)
        return self.augmented(x, rows),y


# ---- any fastai DataLoader --------------------------------------------------------------------------------------------

def classes_of(dl) -> tuple[np.ndarray, dict]:
    """Class codes (N) of all items of a fastai DataLoader, in order, and a dict from each code to the name of its class

    Classes that are not in the vocabulary, such as the validation classes of a `CategoryBlock`, have codes after it. UserError for a
    dataset without labels.
    """
    if getattr(dl, 'packed', None):
        vocab = dl.dataset.vocab
        codes = dl.labels()
        return codes,{c:vocab[c] for c in np.unique(codes).tolist()}
    tl = getattr(dl.dataset, 'tls', [None])[-1]
    if tl is None or len(dl.dataset.tls) < 2:
        raise UserError('the data has no labels that can be read: make DataLoaders by a DataBlock with ImageBlock and CategoryBlock')
    raw = Pipeline([f for f in tl.tfms.fs if not isinstance(f, Categorize)])
    names = [raw(tl._get(i)) for i in range(len(tl))] # the rows of a DataFrame are items, too
    names = [n.item() if isinstance(n, torch.Tensor | np.generic) and not n.shape else n for n in names]
    odd = next((n for n in names if not isinstance(n, str | int | bool)), None)
    if odd is not None: raise UserError(f'a label is a {type(odd).__name__}: an image must have one class, a text or a whole number')
    if not any(isinstance(f, Categorize) for f in tl.tfms.fs) and all(isinstance(n, int) for n in names): # codes already
        return np.array(names, np.int64),{n:n for n in names}
    vocab = list(getattr(tl, 'vocab', ()) or ())
    known = {c:i for i,c in enumerate(vocab)}
    known |= {c:len(vocab) + i for i,c in enumerate(sorted(set(names) - known.keys(), key=str))}
    codes = np.array([known[c] for c in names], np.int64)
    return codes,{i:c for c,i in known.items() if i in set(codes.tolist())}

def plain_images(dl, bs=256, labels=True):
    """A loader that gives every item of a fastai DataLoader once, in order and not augmented

    Packed images come with their labels if `labels` says so, and any other images without labels.
    """
    packed = getattr(dl, 'packed', None)
    if packed and labels: return dl.plain(bs)
    tl = dl.dataset.tls[0]
    images = Datasets(tls=[tl._new(tl.items, split_idx=1)]) # split_idx=1 is a validation set, which fastai does not augment
    plain = dict(aug=None, views=None) if isinstance(dl, SeededDL) else {}
    return dl.new(images, cls=TfmdDL if packed else SeededDL, bs=bs, shuffle=False, drop_last=False, **plain)

class FewShotDataLoaders(DataLoaders):
    "DataLoaders of packed images that also take photos: files, PIL images, arrays and tensors, cut to squares as the packed images were"
    def new_empty(self):
        "Copies of these DataLoaders without images and labels, for `Learner.export`"
        empty = super().new_empty()
        for tl in (tl for dl in empty.loaders for tl in dl.dataset.tls):
            tl.tfms.fs = [f.emptied() if isinstance(f, PackedImage | PackedLabel) else f for f in tl.tfms.fs]
        return empty
    def test_dl(self, test_items, rm_type_tfms=None, with_labels=False, **kwargs):
        "A loader of photos without labels, for `get_preds(dl=...)`; UserError for a photo that cannot be read, and for `with_labels`"
        packed = self.valid.packed
        if with_labels: raise UserError('photos have no labels here: give them without, and compare the predictions yourself')
        images = [TensorImage(torch.from_numpy(photo(o, packed.px).copy()).movedim(-1, 0)) for o in test_items]
        tl = self.valid.dataset.tls[0]._new(images, split_idx=1)
        tl.tfms.fs = [f for f in tl.tfms.fs if not isinstance(f, PackedImage)]
        return self.valid.new(Datasets(tls=[tl]), cls=TfmdDL, shuffle=False, drop_last=False, **dict(bs=64) | kwargs)

def photo(item, px):
    "uint8 array (px, px, 3) of a file, a PIL image, an array (H, W, 3) or a tensor (3, H, W) of uint8; UserError for anything else"
    try:
        if isinstance(item, str | Path): return decode(read_bytes(item), px)
        if isinstance(item, torch.Tensor): item = item.movedim(0, -1).cpu().numpy()
        return square(upright_rgb(item if isinstance(item, Image.Image) else Image.fromarray(np.asarray(item))), px)
    except Exception as e: raise UserError(f'{item if isinstance(item, str | Path) else type(item).__name__} cannot be read as an image '
                                           f'({first_line(e)}): give a file, a PIL image or uint8 numbers') from None
