"""Features of images: computed once, and kept in a file on disk for later use."""
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from fastai.data.load import DataLoader

from ..core.device import amp as autocast
from ..core.device import autocast_dtype, ieee_float32
from ..core.distributed import all_sum, rank_world
from ..core.errors import UserError
from ..core.progress import with_progress
from ..core.storage import default_cache, digest, filled_array, load_array, locked, sweep, user_path
from ..data.augment import train_augmentation
from ..data.blocks import plain_dl
from ..data.cache import FewShotData
from ..data.loaders import VIEWS_SEED
from ..models.create import features, input_config, seeing

__all__ = ['cached_features', 'ViewFeatures', 'view_features', 'embed']


def cached_features(
    net:torch.nn.Module, # timm model
    data:FewShotData, # FewShotData
    split:str, # 'train', 'val' or 'test'
    views:int=0, # number of augmented views of each image, made as in training; 0: the images themselves
    jitter:bool=True, # whether the views have colour jitter
    seed:int=0, # seed of the views
    stats:Sequence|None=None, # (mean, std) to normalise images with; None: those of the network's `pretrained_cfg`
    cache:str|Path|None=None, # folder for the features; None: `default_cache()`
    mirror:bool=False, # average the features of each image with those of its mirror image
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D), or (views, N, D) with `views`, in float32, and classes (N) of a split

    They are computed once and then read from a memory-mapped file, whose name depends on weights, data, settings and the
    kind of device. UserError if the cache folder cannot be written.
    """
    if stats is None: _,*stats = input_config(net)
    dl = plain_dl(data, split, stats=stats, aug=train_augmentation(data.px, jitter) if views else None, seed=seed)
    meta = _meta(net, data, split, stats, dl.device, mirror)
    if views: meta |= dict(views=views, jitter=jitter, augment='batch', seed=seed)
    h = torch.from_numpy(_kept(meta, cache, net, dl, max(1, views), np.float32)[0])
    return (h if views else h[0]).to(dl.device),torch.tensor(getattr(data, split).y, device=dl.device)

def _meta(net, data, split, stats, device, mirror):
    "What the features of a network depend on"
    meta = dict(weights=digest(net.state_dict()), net=type(net).__name__, data=data.fingerprint, split=split, stats=stats,
                precision='ieee float32', device=torch.device(device).type)
    return meta | (dict(mirror=True) if mirror else {})

def _kept(meta, cache, net, dl, passes, kept_as, dtype=None):
    """(h, made): the memory-mapped features h (passes, N, D) of `passes` runs through `dl`, and whether they had to be computed

    They are in a file that is named after `meta`; they are computed in `dtype` (see `embed`) and kept as `kept_as`.
    """
    key = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]
    path = user_path(cache or default_cache(), '--cache')/'features'/f'{key}.npy'
    try: path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e: raise UserError(f'{path.parent} cannot be written ({e.strerror}): give --cache another folder') from None
    with locked(path.with_suffix('.lock')):
        try: h,found = load_array(path)
        except UserError: found = None # the file is missing or damaged
        made = found != meta
        if made:
            sweep(path.parent, path.name)
            net = net.to(dl.device).eval()
            x = dl.one_batch()[0][:1].as_subclass(torch.Tensor)
            with torch.no_grad(): n_features = features(net, x).shape[1]
            mirror = meta.get('mirror', False)
            dl.epoch = meta.get('view', 0) - 1 # `one_batch` has begun an epoch
            with filled_array(path, (passes, len(dl.dataset), n_features), kept_as, meta) as h:
                for one_pass in h: embed(net, dl, dtype, one_pass, mirror=mirror)
            h,_ = load_array(path)
    return h,made


class ViewFeatures:
    """Features that a network has of V augmented views of each of N images: `arrays` are V arrays (N, D), which may be memory-mapped

    `aug` is the padding and the jitter of the augmentation, where it is known, and `mirror` says whether the features are averaged with
    those of the mirror image.
    """
    def __init__(self, arrays:Sequence[np.ndarray], aug:tuple|None=None, mirror:bool=False):
        self.aug,self.mirror = aug,mirror
        self.arrays = [np.asarray(a) for a in arrays]
        self.views = len(self.arrays)
        self.shape = self.views,*self.arrays[0].shape
    def __len__(self): return self.shape[1]
    def of(self, views:np.ndarray, rows:np.ndarray) -> torch.Tensor:
        "Features (B, D) in float32 of the view `views[i]` of the image `rows[i]`, for each i"
        h = np.empty((len(rows), self.shape[2]), np.float32)
        for v in np.unique(views):
            at = views == v
            h[at] = self.arrays[v][rows[at]]
        return torch.from_numpy(h)


def view_features(
    net:torch.nn.Module, # timm model
    data:FewShotData, # FewShotData
    views:int, # V, number of augmented views of each base image
    jitter:bool=True, # whether the views have colour jitter
    cache:str|Path|None=None, # folder for the features; None: `default_cache()`
    amp:bool=True, # compute in bfloat16 or float16 if the device supports it, as a training does
    mirror:bool=False, # average the features of each view with those of its mirror image
    # function that is called after each view, with True if the view had to be computed; it may raise an error to stop
    after_each:Callable|None=None,
) -> ViewFeatures:
    """The features of the views of the base images that a loader with `views` gives

    A network whose `pretrained_cfg` asks for another side or normalisation than the data's sees the images as it wants them (`seeing`).
    Each view has a memory-mapped float16 file, so that an interrupted computation goes on where it was, more views are added to those that
    there are, and several processes share them. UserError if the cache folder cannot be written.
    """
    aug = train_augmentation(data.px, jitter)
    dl = plain_dl(data, 'train', aug=aug, seed=VIEWS_SEED)
    dtype = autocast_dtype(dl.device) if amp else None
    net = seeing(net, data.px, data.stats)
    same = _meta(net, data, 'train', data.stats, dl.device, mirror) | dict(jitter=jitter, augment='batch', dtype='float16')
    if dtype: same['precision'] = str(dtype).removeprefix('torch.')
    net = net.to(memory_format=torch.channels_last)
    arrays = []
    for v in with_progress(range(views)):
        h,made = _kept(same | dict(view=v), cache, net, dl, 1, np.float16, dtype)
        arrays.append(h[0])
        if after_each: after_each(made)
    return ViewFeatures(arrays, (aug.pad, aug.jitter), mirror)


@torch.no_grad()
def embed(
    model:torch.nn.Module, # timm model or other module; its training mode is not changed
    dl:DataLoader, # DataLoader of (images, labels), such as `plain_dl(data, 'test')`, or of images alone, whose labels are then all 0
    dtype:torch.dtype|None=None, # dtype for autocast; None: float32 in full precision (`ieee_float32`)
    out:np.ndarray|None=None, # array (N, D) for the features, for example memory-mapped; None: a new tensor on the model's device
    distributed:bool=False, # in a distributed run, each process embeds a part and all get the whole
    mirror:bool=False, # average the features of each image with those of its mirror image
) -> tuple[torch.Tensor, torch.Tensor]:
    "Features (N, D) in float32 and labels (N) of all images of `dl`, in order"
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    h = None if out is None else torch.from_numpy(out)
    y = None
    N = len(dl.dataset)
    rank,n = rank_world() if distributed else (0, 1)
    if n > 1: dl = dl.new(share=(rank, n), bs=min(dl.bs, -(-N//n))) # each process gets at least one image
    at = rank*dl.bs if n > 1 else 0
    try:
        with autocast(device, dtype), ieee_float32() if dtype is None else nullcontext():
            for x,*labels in dl:
                h_b = features(model, x.as_subclass(torch.Tensor).to(device), mirror)
                if h is None: h = torch.zeros(N, *h_b.shape[1:], device=device) # made at once, so that parts need no copy
                if y is None: y = torch.zeros(N, dtype=torch.int64, device=device)
                h[at:at+len(h_b)] = h_b
                for y_b in labels: y[at:at+len(h_b)] = y_b.as_subclass(torch.Tensor).to(device)
                at += len(h_b) + (n-1)*dl.bs if n > 1 else len(h_b)
    finally: model.train(was_training)
    return (all_sum(h),all_sum(y)) if n > 1 else (h,y)
