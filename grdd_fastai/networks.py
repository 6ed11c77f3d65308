"""Trained networks by name or path, and their features of a data set, kept on disk."""
import hashlib
import json
from pathlib import Path

import numpy as np
import timm
import torch

from .augment import train_augmentation
from .data import plain_dl
from .errors import UserError, first_line
from .evaluate import embed, features
from .learners import check_backbone, create_backbone
from .pack import default_cache
from .run import load_weights
from .storage import digest, filled_array, load_array, locked

__all__ = ['load_network', 'images_of', 'feature_bank']

RUNS = ('net', 'student_grdd') # what a run leaves as its network


def load_network(of):
    """The network `of` names, without a classifier: a timm model with pretrained weights, a folder of recipes/publish.py, the folder of a
    run, or weights of one (`runs/grdd/student_cl`)

    Its `pretrained_cfg` has the side of its images, and the mean and std they are normalised with. UserError if it is none of these.
    """
    path = Path(str(of).removesuffix('.safetensors')).expanduser()
    cards = [*(path/f'{name}.json' for name in RUNS), *([path.with_name(f'{path.name}.json')] if path.name else [])]
    if card := next((c for c in cards if c.is_file() and c.with_suffix('.safetensors').is_file()), None): return _of_a_run(card)
    local = (path/'config.json').is_file()
    if path.exists() and not local: raise UserError(f'{path} holds no network (net.json or config.json): give the folder of a run or of recipes/publish.py')
    if not local and not str(of).startswith('hf-hub:'): check_backbone(str(of))
    try: return timm.create_model(f'local-dir:{path}' if local else str(of), pretrained=True, num_classes=0)
    except Exception as e: raise UserError(f'the weights of {of} cannot be had ({first_line(e)}): give a name with a tag that has weights, or a path') from None

def _of_a_run(card):
    try: about = json.loads(card.read_text()); arch,px,(mean,std) = about['arch'],about['px'],about['stats']
    except (OSError, ValueError, KeyError): raise UserError(f'{card} is damaged or no network\'s: give the folder of a run') from None
    net = create_backbone(arch, 0, px)
    load_weights(net, card.with_suffix(''), without=f'{net.pretrained_cfg["classifier"]}.')
    net.pretrained_cfg = net.pretrained_cfg | dict(input_size=(3, px, px), mean=tuple(mean), std=tuple(std), crop_pct=1.)
    return net

def images_of(net):
    "Side, mean and std of the images that a timm network takes, as its `pretrained_cfg` has them"
    cfg = net.pretrained_cfg
    return cfg['input_size'][1],list(cfg['mean']),list(cfg['std'])


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
    path = Path(cache or default_cache()).expanduser()/'features'/f'{key}.npy'
    try: path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e: raise UserError(f'{path.parent} cannot be written ({e.strerror}): give --cache another folder') from None
    with locked(path.with_suffix('.lock')):
        try: h,found = load_array(path)
        except UserError: found = None # none there, or a damaged one: embed again
        if found != of:
            net = net.to(dl.device).eval()
            with torch.no_grad(): n_features = features(net, torch.zeros(1, 3, data.px, data.px, device=dl.device)).shape[1]
            with filled_array(path, (max(1, views), len(dl.dataset), n_features), np.float32, of) as h:
                for view in h: embed(net, dl, out=view)
            h,_ = load_array(path)
    h = torch.from_numpy(h if views else h[0])
    return h.to(dl.device),torch.as_tensor(getattr(data, split).y, device=dl.device)
