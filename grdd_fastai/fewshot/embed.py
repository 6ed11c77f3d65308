"""Features of images: computed once, and kept in a file on disk for later use."""
import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from fastai.data.load import DataLoader

from ..core.device import amp, ieee_float32
from ..core.distributed import all_sum, rank_world
from ..core.errors import UserError
from ..core.storage import default_cache, digest, filled_array, load_array, locked, sweep, user_path
from ..data.augment import train_augmentation
from ..data.blocks import plain_dl
from ..data.cache import FewShotData
from ..models.create import features, input_config

__all__ = ['cached_features', 'embed']


def cached_features(
    net:torch.nn.Module, # timm model
    data:FewShotData, # FewShotData
    split:str, # 'train', 'val' or 'test'
    views:int=0, # number of augmented views of each image, made as in training; 0: the images themselves
    jitter:bool=True, # whether the views have colour jitter
    seed:int=0, # seed of the views
    stats:Sequence|None=None, # (mean, std) to normalise images with; None: those of the network's `pretrained_cfg`
    cache:str|Path|None=None, # folder for the features; None: `default_cache()`
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D), or (views, N, D) with `views`, in float32, and classes (N) of a split

    They are computed once and then read from a memory-mapped file, whose name depends on weights, data, settings and the
    kind of device. UserError if the cache folder cannot be written.
    """
    if stats is None: _,*stats = input_config(net)
    dl = plain_dl(data, split, stats=stats, aug=train_augmentation(data.px, jitter) if views else None, seed=seed)
    meta = dict(weights=digest(net.state_dict()), net=type(net).__name__, data=data.fingerprint, split=split, stats=stats,
                precision='ieee float32', device=torch.device(dl.device).type)
    if views: meta |= dict(views=views, jitter=jitter, augment='batch', seed=seed)
    key = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]
    path = user_path(cache or default_cache(), '--cache')/'features'/f'{key}.npy'
    try: path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e: raise UserError(f'{path.parent} cannot be written ({e.strerror}): give --cache another folder') from None
    with locked(path.with_suffix('.lock')):
        try: h,found = load_array(path)
        except UserError: found = None # the file is missing or damaged
        if found != meta:
            sweep(path.parent, path.name)
            net = net.to(dl.device).eval()
            with torch.no_grad(): n_features = features(net, torch.zeros(1, 3, data.px, data.px, device=dl.device)).shape[1]
            with filled_array(path, (max(1, views), len(dl.dataset), n_features), np.float32, meta) as h:
                for view in h: embed(net, dl, out=view)
            h,_ = load_array(path)
    h = torch.from_numpy(h if views else h[0])
    return h.to(dl.device),torch.tensor(getattr(data, split).y, device=dl.device)


@torch.no_grad()
def embed(
    model:torch.nn.Module, # timm model or other module; its training mode is not changed
    dl:DataLoader, # DataLoader of (images, labels), such as `plain_dl(data, 'test')`
    dtype:torch.dtype|None=None, # dtype for autocast; None: float32 in full precision (`ieee_float32`)
    out:np.ndarray|None=None, # array (N, D) for the features, for example memory-mapped; None: a new tensor on the model's device
    distributed:bool=False, # in a distributed run, each process embeds a part and all get the whole
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
        with amp(device, dtype), ieee_float32() if dtype is None else nullcontext():
            for x,y_b in dl:
                h_b = features(model, x.as_subclass(torch.Tensor).to(device))
                if h is None: h = torch.zeros(N, *h_b.shape[1:], device=device) # made at once, so that parts need no copy
                if y is None: y = torch.zeros(N, dtype=torch.int64, device=device)
                h[at:at+len(h_b)] = h_b
                y[at:at+len(h_b)] = y_b.as_subclass(torch.Tensor).to(device)
                at += len(h_b) + (n-1)*dl.bs if n > 1 else len(h_b)
    finally: model.train(was_training)
    return (all_sum(h),all_sum(y)) if n > 1 else (h,y)
