"""Trained networks by name or path, and their features of a data set, kept on disk."""
import hashlib
import json
from pathlib import Path

import timm
import torch

from .augment import train_augmentation
from .callbacks import autocast_dtype
from .data import plain_dl
from .errors import UserError
from .evaluate import embed
from .learners import check_backbone, create_backbone
from .pack import default_cache
from .run import load_weights
from .storage import digest, load_tensors, locked, save_tensors

__all__ = ['load_network', 'feature_bank']


def load_network(of, px=32):
    """`(net, stats)` of `of`: a timm model's name with pretrained weights, a folder of recipes/publish.py, the folder of a training, or
    weights of a run (`runs/grdd/student_grdd`); stats, (mean, std), are what its images are normalised with

    UserError if it is none of these.
    """
    path = Path(str(of).removesuffix('.safetensors')).expanduser()
    card = next((c for c in (path/'net.json', path.with_name(f'{path.name}.json')) if c.is_file()), None)
    if card: # ours, of a run
        about = json.loads(card.read_text())
        net = create_backbone(about['arch'], 0, about['px'])
        load_weights(net, card.with_suffix(''), strict=False)
        return net,about['stats']
    if (path/'config.json').is_file(): net = timm.create_model(f'local-dir:{path}', pretrained=True)
    else:
        if path.exists(): raise UserError(f'{path} holds no network (net.json or config.json): give the folder of a training or of recipes/publish.py')
        if not str(of).startswith('hf-hub:'): check_backbone(str(of))
        try: net = timm.create_model(str(of), pretrained=True, num_classes=0)
        except Exception as e: raise UserError(f'the weights of {of} cannot be had ({str(e).splitlines()[0]}): give a name with a tag that has weights, or a path') from None
    return net,[list(net.pretrained_cfg[k]) for k in ('mean','std')]


def feature_bank(
    net, # timm model
    data, # FewShotData
    split, # 'train', 'val' or 'test'
    stats=None, # (mean, std) its images are normalised with (the data's own)
    views=0, # of augmented views of each image, as in training, instead of the images as they are
    jitter=True, # the views' colours
    seed=0, # of the views
    cache=None, # folder (none: the cache of decoded images)
):
    "Features (N, D), or (views, N, D), and classes (N) of a split: embedded once, then read from a file named by weights and data"
    stats = [list(map(float, s)) for s in stats or data.stats]
    dl = plain_dl(data, split, stats=stats, aug=train_augmentation(data.px, jitter) if views else None, seed=seed)
    dtype = autocast_dtype(torch.device(dl.device))
    of = dict(weights=digest(net.state_dict()), net=type(net).__name__, data=data.fingerprint, split=split, stats=stats, dtype=str(dtype))
    if views: of |= dict(views=views, jitter=jitter, seed=seed)
    key = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(cache or default_cache()).expanduser()/'features'/f'{key}.safetensors'
    try: path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e: raise UserError(f'{path.parent} cannot be written ({e.strerror}): give --cache another folder') from None
    with locked(path.with_suffix('.lock')):
        try: tensors,found = load_tensors(path)
        except UserError: found = None # none there, or a damaged one: embed again
        if found != of:
            net = net.to(dl.device)
            tensors = dict(h=torch.stack([embed(net, dl, dtype)[0] for _ in range(views)]) if views else embed(net, dl, dtype)[0])
            save_tensors(path, tensors, of)
    return tensors['h'].to(dl.device),torch.as_tensor(getattr(data, split).y, device=dl.device)
