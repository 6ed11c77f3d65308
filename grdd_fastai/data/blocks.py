"""fastai DataBlocks and DataLoaders over packed splits: batches of images for stage one, episodes for stage two."""
from collections.abc import Callable, Sequence
from functools import partial

from fastai.data.block import DataBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IntToFloatTensor, Normalize

from ..core.errors import UserError
from .augment import train_augmentation
from .cache import FewShotData
from .class_lists import SPLITS
from .episodes import EpisodicDL, check_episode
from .loaders import FewShotDataLoaders, PackedImage, PackedLabel, SeededDL

__all__ = ['category_block', 'episode_block', 'category_dls', 'episodic_dls', 'plain_dl']


class PackedBlock(DataBlock):
    "A DataBlock whose DataLoaders are `FewShotDataLoaders`"
    def datasets(self, source, verbose=False):
        dsets = super().datasets(source, verbose)
        dsets._dbunch_type = FewShotDataLoaders
        return dsets

def _packed_block(stats, splits, dl_type):
    "DataBlock over packed splits: the first split is for training, the others are for validation"
    return PackedBlock(blocks=(TransformBlock(type_tfms=PackedImage(*splits), batch_tfms=IntToFloatTensor),
                               TransformBlock(type_tfms=PackedLabel(*splits))),
                       get_items=lambda _: range(sum(map(len, splits))),
                       splitter=lambda items: (range(len(splits[0])), range(len(splits[0]), len(items))),
                       batch_tfms=Normalize.from_stats(*stats), dl_type=dl_type)

def category_block(data:FewShotData, dl_type:Callable=SeededDL) -> DataBlock:
    """DataBlock of a `FewShotData`: `category_block(data).dataloaders(data)` trains on the base classes

    The validation set holds other *classes*: its images are embedded for episodes, and the network's classifier never sees them.
    """
    return _packed_block(data.stats, (data.train, data.val), dl_type)

def episode_block(data:FewShotData, n_way:int=5, k_shot:int=1, n_query:int=15, n_episodes:int=400, episodes_per_step:int=1) -> DataBlock:
    "DataBlock of episodes: `episode_block(data, n_way=5, k_shot=1).dataloaders(data)`"
    return category_block(data, partial(EpisodicDL, n_way=n_way, k_shot=k_shot, n_query=n_query, n_episodes=n_episodes,
                                        episodes_per_step=episodes_per_step))

def _dataloaders(block, data, aug, views=None, **kwargs):
    aug = train_augmentation(data.px) if isinstance(aug, str) and aug == 'default' else aug
    return block.dataloaders(data, dl_kwargs=[dict(aug=aug, views=views), dict(aug=None, views=None)], **kwargs)

def default_bs(data:FewShotData) -> int:
    "Images per batch of stage one: 64, or 1% of fewer than 6,400 base images, at least 16, since a small set needs many steps"
    return min(64, max(16, len(data.train)//100))

def category_dls(
    data:FewShotData, # FewShotData
    bs:int|None=None, # images per batch, before rotation; None: the paper's 64, or 1% of a base set of under 6,400 images, but at least 16
    # 'default': `train_augmentation`; or an albumentations Compose for uint8 images, a function (see `SeededDL`) or None
    aug:Callable|str|None='default',
    seed:int=0, # seed of the order and the augmentation
    views:int|None=None, # number of different augmented views of an image (see `SeededDL`); None: new ones in each epoch
    num_workers:int=0, # worker processes; packed images need none
    **kwargs # further arguments of `DataBlock.dataloaders`
) -> DataLoaders:
    "DataLoaders of stage one: shuffled batches of base images to train on, and the validation classes"
    bs = min(default_bs(data) if bs is None else bs, len(data.train))
    return _dataloaders(category_block(data), data, aug, views, num_workers=num_workers, bs=bs, val_bs=256, seed=seed, **kwargs)

def episodic_dls(
    data:FewShotData, # FewShotData
    n_way:int=5, # C, classes per episode
    k_shot:int=1, # K, support images per class
    n_query:int=15, # query images per class
    n_episodes:int=400, # episodes per epoch
    episodes_per_step:int=1, # episodes per optimiser step
    # 'default': `train_augmentation`; or an albumentations Compose for uint8 images, a function (see `SeededDL`) or None
    aug:Callable|str|None='default',
    seed:int=0, # seed of the episodes and the augmentation
    views:int|None=None, # number of different augmented views of an image (see `SeededDL`); None: new ones in each epoch
    num_workers:int=0, # worker processes; packed images need none
    **kwargs # further arguments of `DataBlock.dataloaders`
) -> DataLoaders:
    "DataLoaders of stage two: episodes of base classes to train on, and the validation classes; UserError if the data cannot fill them"
    check_episode(data.train, n_way, k_shot, n_query)
    block = episode_block(data, n_way, k_shot, n_query, n_episodes, episodes_per_step)
    return _dataloaders(block, data, aug, views, num_workers=num_workers, seed=seed, **kwargs)

def plain_dl(
    data:FewShotData, # FewShotData
    split:str='test', # 'train', 'val' or 'test'
    bs:int=256, # images per batch
    stats:Sequence|None=None, # (mean, std) to normalise with; None: those of the data
    **kwargs # arguments of `SeededDL`; with `aug`, every pass gives new views
) -> SeededDL:
    "DataLoader of all images of a split in order, normalised, and augmented only if `aug` is given; UserError for an unknown split"
    known = ', '.join(SPLITS)
    if split not in SPLITS: raise UserError(f'there is no split {split!r}: it is one of {known}')
    block = _packed_block(stats or data.stats, (getattr(data, split),), SeededDL)
    return block.dataloaders(data, bs=bs, shuffle=False, drop_last=False, num_workers=0, **kwargs).train
