"""fastai DataBlocks and DataLoaders over packed splits: batches for stage one, episodes for stage two."""
import random
from functools import cached_property, partial

import fastai.vision.data  # noqa: F401  (registers show_batch for images)
import matplotlib.pyplot as plt
import numpy as np
import torch
from fastai.data.block import DataBlock, TransformBlock
from fastai.data.core import TfmdDL
from fastai.data.transforms import Category, IntToFloatTensor, Normalize
from fastai.torch_core import TensorCategory, TensorImage
from fasttransform import DisplayedTransform

from .augment import seeded, train_augmentation
from .errors import UserError
from .prepare import SPLITS

__all__ = ['PackedImage', 'PackedLabel', 'SeededDL', 'EpisodicDL', 'category_block', 'episode_block', 'category_dls',
           'episodic_dls', 'plain_dl', 'check_episode', 'rows_by_class']


# ---- rows of packed splits as fastai items ----------------------------------------------------------------------------

class PackedImage(DisplayedTransform):
    "Row, or rows of one split -> uint8 image(s) (..., 3, H, W); rows count through `splits` in turn"
    def __init__(self, *splits):
        self.images,self.starts = [s.images for s in splits],np.cumsum([0] + [len(s) for s in splits])
    def encodes(self, rows):
        rows = np.asarray(rows)
        i = np.searchsorted(self.starts, rows.flat[0], 'right') - 1
        images,rows = self.images[i],rows - self.starts[i]
        x = (images[torch.as_tensor(rows, device=images.device)] if isinstance(images, torch.Tensor)
             else torch.from_numpy(np.array(images[rows])))
        return TensorImage(x.movedim(-1, -3))
    def hold(self, device, room):
        "From now on the images lie on `device`, if all of them take no more than `room` bytes"
        if sum(im.nbytes for im in self.images) <= room:
            self.images = [torch.as_tensor(np.asarray(im) if isinstance(im, np.ndarray) else im, device=device) for im in self.images]

class PackedLabel(DisplayedTransform):
    "Row, or rows -> class code(s); the first split's classes come first and `c` is their number"
    def __init__(self, *splits):
        n_before = np.cumsum([0] + [len(s.vocab) for s in splits])
        self.y = np.concatenate([s.y + n for s,n in zip(splits, n_before)])
        self.vocab,self.c = [c for s in splits for c in s.vocab],len(splits[0].vocab)
    def encodes(self, rows): return TensorCategory(torch.as_tensor(self.y[np.asarray(rows)]))
    def decodes(self, o:TensorCategory): return Category(self.vocab[int(o)])


def check_episode(split, n_way, k_shot, n_query):
    "UserError if `split` cannot hold an episode of `n_way` classes with `k_shot + n_query` images each"
    rows_by_class(split.y, n_way, k_shot, n_query, f'the {split.name} split', split.vocab)

def rows_by_class(y, n_way, k_shot, n_query, where='the data', vocab=None):
    "Rows of each class of `y`, or a UserError if they cannot fill an episode"
    for name,v,lowest in (('way', n_way, 2), ('shot', k_shot, 1), ('query', n_query, 1)):
        if not isinstance(v, int | np.integer) or v < lowest:
            raise UserError(f'an episode of {v!r} {name}: it must be a whole number, at least {lowest}')
    classes = np.unique(y)
    rows = [np.flatnonzero(y==c) for c in classes]
    if n_way > len(rows):
        raise UserError(f'{where} has {len(rows)} classes, too few for {n_way}-way episodes: lower the way or add classes')
    least = min(range(len(rows)), key=lambda i: len(rows[i]))
    if len(rows[least]) < k_shot + n_query: raise UserError(
        f'class {vocab[least] if vocab else classes[least]} of {where} has {len(rows[least])} images, '
        f'too few for {k_shot} support + {n_query} '
        'query images: lower --query (or the shot) or add images')
    return rows


# ---- loaders ----------------------------------------------------------------------------------------------------------

class SeededDL(TfmdDL):
    """A `TfmdDL` whose order and augmentation are functions of `seed`, epoch and row, for any number of workers

    `epoch` counts the iterations begun; our Learners set it. Packed splits are read a whole batch at a time; `aug` augments their
    images: an albumentations `Compose`, or a function of (uint8 images, seed, epoch, rows) such as `BatchAugmentation`, which without
    workers runs on the loader's device. Images that fit into a quarter of a GPU's free memory stay there. Any other fastai dataset is
    read item by item, as ever. `share` is (rank, ranks): of each ranks * bs items the rank's bs.
    """
    def __init__(self, dataset, bs=64, seed=0, aug=None, share=(0, 1), **kwargs):
        if not isinstance(bs, int | np.integer | type(None)) or (bs is not None and bs < 1):
            raise UserError(f'a batch of {bs!r} images: it must be at least 1')
        if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
            raise UserError(f'the seed is {seed!r}: give a whole number, 0 or more')
        if aug is not None and not callable(aug): raise UserError(f'aug is {aug!r}: give an albumentations Compose, a function or None')
        self.seed,self.epoch,self.aug,self.augment,self.share = seed,-1,aug,seeded(aug),share
        super().__init__(dataset, bs=bs, **kwargs)

    def new(self, dataset=None, cls=None, **kwargs):
        return super().new(dataset, cls, **{**dict(seed=self.seed, aug=self.aug, share=self.share), **kwargs})

    def shared(self, rank, ranks):
        "What `rank` of `ranks` processes trains on: its part of each step, all parts as large"
        return self.new(bs=max(1, self.bs//ranks), share=(rank, ranks), drop_last=True)

    def plain(self, bs=256):
        "Every item once, in order and not augmented"
        return self.new(cls=SeededDL, aug=None, bs=bs, shuffle=False, drop_last=False)

    @cached_property
    def packed(self):
        "The dataset's `PackedImage`, None for any other dataset"
        return next((f for f in self.dataset.tls[0].tfms.fs if isinstance(f, PackedImage)), None)
    @cached_property
    def rows(self): return np.asarray(list(self.dataset.items))
    def labels(self):
        "Class code of every item of the dataset"
        y = self.dataset.tls[-1]
        return y.tfms(self.rows).numpy() if self.packed else np.asarray([int(o) for o in y])

    def randomize(self):
        self.epoch += 1
        self.rng = random.Random(f'{self.seed} {self.epoch}')

    def before_iter(self):
        super().before_iter()
        if self.packed and self.on_device and self.device.type == 'cuda':
            self.packed.hold(self.device, torch.cuda.mem_get_info(self.device)[0]//4)

    @property
    def on_device(self):
        "Batches are made in this process, on the loader's device"
        return self.device is not None and self.fake_l.num_workers == 0

    def get_idxs(self): return self.my_share(super().get_idxs(), self.drop_last)
    def my_share(self, idxs, whole):
        "Of `idxs`, `bs` at a time in turn, those of this rank; `whole` leaves out a last step that is not whole"
        rank,ranks = self.share
        if ranks == 1: return idxs
        n,step = len(idxs),ranks*self.bs
        return [i for at in range(rank*self.bs, n//step*step if whole else n, step) for i in idxs[at:at+self.bs]]
    def __len__(self):
        rank,ranks = self.share
        if ranks == 1: return super().__len__()
        return self.n//(ranks*self.bs) if self.drop_last else len(range(rank*self.bs, self.n, ranks*self.bs))

    def do_item(self, i): return (i or 0) if self.packed else super().do_item(i)
    def do_batch(self, b):
        if not self.packed: return super().do_batch(b)
        rows = self.rows[np.asarray(b)]
        x,y = (tl.tfms(rows) for tl in self.dataset.tls)
        if self.augment:
            if self.on_device: x = x.to(self.device)
            x = TensorImage(self.augment(x.as_subclass(torch.Tensor), self.seed, max(self.epoch, 0), rows))
        return x,y


class EpisodicDL(SeededDL):
    """Episodes of `n_way` classes with `k_shot` support and `n_query` query images each, `n_episodes` an epoch

    A batch is `per_step` episodes one after the other, (per_step * n_way * (k_shot + n_query), 3, H, W), each class-major
    with a class's support before its queries: `split_episodes` takes it apart. Support and query are disjoint.
    """
    def __init__(self, dataset, n_way=5, k_shot=1, n_query=15, n_episodes=400, per_step=1, **kwargs):
        for k,v,most in (('n_episodes', n_episodes, 100_000), ('per_step', per_step, 10_000)):
            if not isinstance(v, int | np.integer) or not 1 <= v <= most: raise UserError(f'{k} is {v!r}: it must be from 1 to {most}')
        self.episode = dict(n_way=n_way, k_shot=k_shot, n_query=n_query, n_episodes=n_episodes, per_step=per_step)
        self.n_way,self.k_shot,self.n_query,self.n_item,self.n_episodes = n_way,k_shot,n_query,k_shot + n_query,n_episodes
        for k in ('bs','shuffle','drop_last','n'): kwargs.pop(k, None) # episodes fix them
        super().__init__(dataset, bs=per_step*n_way*self.n_item, **kwargs)

    def new(self, dataset=None, cls=None, **kwargs):
        return super().new(dataset, cls, **({**self.episode, **kwargs} if cls is None else kwargs))

    def shared(self, rank, ranks):
        "What `rank` of `ranks` processes trains on: whole episodes, as many as the others"
        return self.new(per_step=max(1, self.episode['per_step']//ranks), share=(rank, ranks))

    @cached_property
    def by_class(self):
        return rows_by_class(self.labels(), self.n_way, self.k_shot, self.n_query)

    def __len__(self):
        ranks,per_step = self.share[1],self.episode['per_step']
        return -(-self.n_episodes // per_step) if ranks == 1 else self.n_episodes // (ranks*per_step)
    def get_idxs(self):
        "Drawn here, in the main process: as many workers as one likes give the same episodes"
        rng = np.random.default_rng([self.seed, max(self.epoch, 0)])
        return self.my_share([int(i) for _ in range(self.n_episodes)
                              for c in rng.choice(len(self.by_class), self.n_way, replace=False)
                              for i in rng.choice(self.by_class[c], self.n_item, replace=False)], whole=True)

    def show_batch(self, b=None, max_n=None, ctxs=None, show=True, figsize=None, nrows=5, **kwargs):
        "Draw the first episode: a class a row, at most `nrows`; its support images framed, then its queries (at most `max_n` a row)"
        if not show: return super().show_batch(b, show=False)
        x,y = self.decode(self.one_batch() if b is None else b)
        n,nrows,names = min(self.n_item, max_n or self.k_shot + 7),min(self.n_way, nrows),self.dataset.tls[-1].tfms
        _,axes = plt.subplots(nrows, n, figsize=figsize or (1.1*n, 1.2*nrows), squeeze=False)
        for i,row in enumerate(axes):
            for j,ax in enumerate(row):
                k,support = i*self.n_item + j,j < self.k_shot
                x[k].show(ctx=ax)
                ax.set(xticks=[], yticks=[])
                ax.axis('on')
                for side in ax.spines.values(): side.set(color='C1' if support else '0.85', linewidth=3 if support else 1)
                if i==0 and j in (0, self.k_shot): ax.set_title('support' if support else 'query', loc='left', fontsize=10)
            row[0].set_ylabel(str(names.decode(y[i*self.n_item])), fontsize=9)


# ---- blocks and DataLoaders -------------------------------------------------------------------------------------------

def _packed_block(stats, splits, dl_type):
    "DataBlock over packed splits: trains on the first, validates on the rest"
    return DataBlock(blocks=(TransformBlock(type_tfms=PackedImage(*splits), batch_tfms=IntToFloatTensor),
                             TransformBlock(type_tfms=PackedLabel(*splits))),
                     get_items=lambda _: range(sum(map(len, splits))),
                     splitter=lambda items: (range(len(splits[0])), range(len(splits[0]), len(items))),
                     batch_tfms=Normalize.from_stats(*stats), dl_type=dl_type)

def category_block(data, dl_type=SeededDL):
    """DataBlock of a `FewShotData`: `category_block(data).dataloaders(data)` trains on the base classes

    The validation set is the validation *classes*: images to embed and draw episodes from, never to classify.
    """
    return _packed_block(data.stats, (data.train, data.val), dl_type)

def episode_block(data, n_way=5, k_shot=1, n_query=15, n_episodes=400, per_step=1):
    "DataBlock of episodes: `episode_block(data, n_way=5, k_shot=1).dataloaders(data)`"
    return category_block(data, partial(EpisodicDL, n_way=n_way, k_shot=k_shot, n_query=n_query, n_episodes=n_episodes,
                                        per_step=per_step))

def _dataloaders(block, data, aug, **kwargs):
    aug = train_augmentation(data.px) if isinstance(aug, str) and aug == 'default' else aug
    return block.dataloaders(data, dl_kwargs=[dict(aug=aug), dict(aug=None)], **kwargs)

def category_dls(
    data, # FewShotData
    bs=None, # images a batch, before rotation; None is the paper's 64, or 1% of a base set of under 6,400, at least 16
    aug='default', # `train_augmentation`; or an albumentations Compose for uint8 images, a function (`SeededDL`), None
    seed=0, # of order and augmentation
    num_workers=0, # packed images need none
    **kwargs
):
    "Stage one's DataLoaders: shuffled batches of base images, validation classes beside them"
    if bs is None: bs = min(64, max(16, len(data.train)//100)) # a small set needs steps more than it needs full batches
    bs = min(bs, len(data.train))
    return _dataloaders(category_block(data), data, aug, num_workers=num_workers, bs=bs, val_bs=256, seed=seed, **kwargs)

def episodic_dls(
    data, # FewShotData
    n_way=5, # C, classes an episode
    k_shot=1, # K, support images a class
    n_query=15, # query images a class
    n_episodes=400, # episodes an epoch
    per_step=1, # episodes an optimiser step
    aug='default', # `train_augmentation`; or an albumentations Compose for uint8 images, a function (`SeededDL`), None
    seed=0, # of episodes and augmentation
    num_workers=0, # packed images need none
    **kwargs
):
    "Stage two's DataLoaders: episodes of base classes, validation classes beside them"
    check_episode(data.train, n_way, k_shot, n_query)
    block = episode_block(data, n_way, k_shot, n_query, n_episodes, per_step)
    return _dataloaders(block, data, aug, num_workers=num_workers, seed=seed, **kwargs)

def plain_dl(
    data, # FewShotData
    split='test', # 'train', 'val' or 'test'
    bs=256, # images a batch
    stats=None, # mean and std to normalise with (the data's own)
    **kwargs # of `SeededDL`: an `aug` makes every pass another view
):
    "Every image of a split, in order, normalised and, without `aug`, not augmented"
    if split not in SPLITS: raise UserError(f'there is no split {split!r}: it is one of {", ".join(SPLITS)}')
    block = _packed_block(stats or data.stats, (getattr(data, split),), SeededDL)
    return block.dataloaders(data, bs=bs, shuffle=False, drop_last=False, num_workers=0, **kwargs).train
