"""fastai DataBlocks and DataLoaders over packed splits: batches for stage one, episodes for stage two."""
from functools import partial

from fastai.data.block import DataBlock, TransformBlock
from fastai.data.transforms import IntToFloatTensor, Normalize

from ..core.errors import UserError
from .augment import train_augmentation
from .episodes import EpisodicDL, check_episode
from .layouts import SPLITS
from .loaders import PackedImage, PackedLabel, SeededDL

__all__ = ['category_block', 'episode_block', 'category_dls', 'episodic_dls', 'plain_dl']


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
