"""Features of images: embedded once, and kept on disk where they are wanted again."""
import hashlib
import json

import numpy as np
import torch

from ..core.device import amp
from ..core.distributed import ranks, summed
from ..core.errors import UserError
from ..core.storage import default_cache, digest, filled_array, load_array, locked, sweep, user_path
from ..data.augment import train_augmentation
from ..data.blocks import plain_dl
from ..models.create import features, images_of

__all__ = ['feature_bank', 'embed']


def feature_bank(
    net, # timm model
    data, # FewShotData
    split, # 'train', 'val' or 'test'
    views=0, # of augmented views of each image, as in training, instead of the images as they are
    jitter=True, # the views' colours
    seed=0, # of the views
    stats=None, # mean and std the network wants (those of its `pretrained_cfg`)
    cache=None, # folder (none: the cache of decoded images)
):
    """Features (N, D), or (views, N, D), and classes (N) of a split in float32: embedded once, then memory-mapped from a file named by
    weights and data; images are normalised as the network wants them"""
    if stats is None: _,*stats = images_of(net)
    dl = plain_dl(data, split, stats=stats, aug=train_augmentation(data.px, jitter) if views else None, seed=seed)
    of = dict(weights=digest(net.state_dict()), net=type(net).__name__, data=data.fingerprint, split=split, stats=stats)
    if views: of |= dict(views=views, jitter=jitter, augment='batch', seed=seed)
    key = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
    path = user_path(cache or default_cache(), '--cache')/'features'/f'{key}.npy'
    try: path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e: raise UserError(f'{path.parent} cannot be written ({e.strerror}): give --cache another folder') from None
    with locked(path.with_suffix('.lock')):
        try: h,found = load_array(path)
        except UserError: found = None # none there, or a damaged one: embed again
        if found != of:
            sweep(path.parent, path.name)
            net = net.to(dl.device).eval()
            with torch.no_grad(): n_features = features(net, torch.zeros(1, 3, data.px, data.px, device=dl.device)).shape[1]
            with filled_array(path, (max(1, views), len(dl.dataset), n_features), np.float32, of) as h:
                for view in h: embed(net, dl, out=view)
            h,_ = load_array(path)
    h = torch.from_numpy(h if views else h[0])
    return h.to(dl.device),torch.as_tensor(getattr(data, split).y, device=dl.device)


@torch.no_grad()
def embed(
    model, # timm model or module; left in the mode it was in
    dl, # DataLoader of (images, labels): `plain_dl(data, 'test')`
    dtype=None, # autocast to this, float32 if None
    out=None, # array (N, D) that takes the features, memory-mapped for instance; None makes a tensor on the model's device
    shared=False, # the processes of a distributed run each embed a part, all have all
):
    "Features (N, D) in float32 and labels (N) of all images of `dl`, in order"
    was_training,device = model.training,next(model.parameters()).device
    model.eval()
    h,y,N,(rank,n) = None if out is None else torch.from_numpy(out),None,len(dl.dataset),ranks() if shared else (0, 1)
    if n > 1: dl = dl.new(share=(rank, n), bs=min(dl.bs, -(-N//n))) # something for each
    at = rank*dl.bs if n > 1 else 0
    try:
        with amp(device, dtype):
            for x,y_b in dl:
                h_b = features(model, x.as_subclass(torch.Tensor).to(device))
                if h is None: h = torch.zeros(N, *h_b.shape[1:], device=device) # once, never copied
                if y is None: y = torch.zeros(N, dtype=torch.int64)
                h[at:at+len(h_b)],y[at:at+len(h_b)] = h_b,y_b.as_subclass(torch.Tensor)
                at += len(h_b) + (n-1)*dl.bs if n > 1 else len(h_b)
    finally: model.train(was_training)
    return (summed(h),summed(y.to(device))) if n > 1 else (h,y.to(device))
