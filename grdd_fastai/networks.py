"""Trained networks by name or path, and their features of a data set, kept on disk."""
import hashlib
import inspect
import json
import math
import re
from pathlib import Path

import numpy as np
import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from .augment import train_augmentation
from .data import plain_dl
from .errors import UserError, first_line
from .evaluate import embed, features
from .learners import check_backbone, create_backbone
from .pack import LARGEST_SIDE, default_cache
from .run import whole_weights
from .storage import (
    check_state,
    digest,
    filled_array,
    load_array,
    load_state,
    locked,
    read_json,
    read_safetensors,
    sweep,
    user_path,
)

__all__ = ['load_network', 'check_images', 'images_of', 'feature_bank']

RUNS = ('net', 'student_grdd') # what a run leaves as its network
PICKLES = ('.bin', '.pth', '.pt', '.ckpt', '.pkl', '.pickle', '.tar', '.npz', '.h5')


def load_network(of):
    """The network that `of` names, without a classifier

    `of` is a timm model with pretrained weights, a folder of recipes/publish.py, `hf-hub:user/name`, the folder of a run, or weights of one
    (`runs/grdd/student_cl`). The network's `pretrained_cfg` has the side of its images, and the mean and std they are normalised with. A
    folder's weights are read from `model.safetensors` alone, and have to be exactly those of the network that its `config.json` describes.
    UserError if `of` is none of these.
    """
    path = user_path(str(of).removesuffix('.safetensors'), 'the network')
    cards = [*(path/f'{name}.json' for name in RUNS), *([path.with_name(f'{path.name}.json')] if path.name else [])]
    if card := next((c for c in cards if c.is_file() and c.with_suffix('.safetensors').is_file()), None): return _of_a_run(card)
    if str(of).startswith('hf-hub:'): return _of_a_folder(_from_hub(str(of).removeprefix('hf-hub:')))
    if (path/'config.json').exists(): return _of_a_folder(path)
    if path.exists():
        raise UserError(f'{path} holds no network (net.json or config.json): give the folder of a run or of recipes/publish.py')
    return create_backbone(str(of), pretrained=True)

def _of_a_run(card):
    try:
        about = read_json(card, keys=dict(arch=str, px=int, stats=list))
        (mean,std),px = about['stats'],about['px']
        config = check_images(px, mean, std)
        check_backbone(about['arch'])
    except (UserError, TypeError, ValueError) as e:
        raise UserError(f'{card} is damaged or no network\'s ({first_line(e)}): give the folder of a run') from None
    return _with_weights(about['arch'], config, {}, card.with_suffix('.safetensors'), lambda: whole_weights(card.with_suffix(''))[1])

def _of_a_folder(folder):
    weights = folder/'model.safetensors'
    config = read_json(folder/'config.json', keys=dict(architecture=str))
    if not weights.is_file():
        other = next((f.name for f in sorted(folder.iterdir()) if f.suffix in PICKLES), None)
        raise UserError(f'{folder} has no model.safetensors' +
                        (f' but {other}, a format that can run any program when it is read: ask its author for safetensors'
                        if other else ': take it from a copy'))
    try:
        cfg = config.get('pretrained_cfg', config)
        c,*sides = cfg['input_size']
        if c != 3 or len(sides) != 2 or sides[0] != sides[1]:
            raise ValueError(f'its images are {c} x {" x ".join(map(str, sides))}, not RGB squares')
        images = check_images(sides[0], cfg['mean'], cfg['std'], cfg.get('crop_pct', 1.), cfg.get('interpolation', 'bicubic'))
        args = _arguments(config.get('model_args') or {})
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise UserError(f'{folder/"config.json"} does not describe a network ({type(e).__name__}: {first_line(e)}): '
                        'take it from a copy') from None
    check_backbone(config['architecture'])
    def tensors():
        try: return read_safetensors(weights)[0]
        except Exception as e: raise UserError(f'{weights} is damaged ({first_line(e)}): take it from a copy') from None
    return _with_weights(config['architecture'], images, args, weights, tensors)

def check_images(px, mean, std, crop_pct=1., interpolation='bicubic'):
    "Side and normalisation of a network's images as `pretrained_cfg` holds them; ValueError if they are impossible"
    def numbers(v): return isinstance(v, list | tuple) and len(v) == 3 and all(isinstance(n, int | float) and math.isfinite(n) for n in v)
    if type(px) is not int or not 1 <= px <= LARGEST_SIDE: raise ValueError(f'images of {px!r} px: from 1 to {LARGEST_SIDE} can be')
    if not numbers(mean) or not numbers(std) or min(std) <= 0:
        raise ValueError(f'mean {mean!r}, std {std!r}: three numbers each, those of std positive')
    if not isinstance(crop_pct, int | float) or not 0 < crop_pct <= 1: raise ValueError(f'crop_pct {crop_pct!r}: above 0, at most 1')
    if interpolation not in ('bicubic', 'bilinear', 'nearest', 'lanczos', 'random'):
        raise ValueError(f'interpolation {interpolation!r} is none')
    return dict(input_size=(3, px, px), mean=tuple(mean), std=tuple(std), crop_pct=crop_pct, interpolation=interpolation)

def _arguments(args):
    "A stranger's arguments of an architecture: plain, small, and none of timm's own, which name files for instance"
    def small(v, depth=2):
        if isinstance(v, list): return depth and len(v) <= 64 and all(small(o, depth-1) for o in v)
        return v is None or isinstance(v, bool) or (isinstance(v, str) and len(v) <= 100) or (isinstance(v, int | float) and abs(v) <= 4096)
    def total(v): return sum(map(total, v)) if isinstance(v, list) else v if isinstance(v, int) else 0
    own = [*inspect.signature(timm.create_model).parameters, 'features_only', 'out_indices', 'feature_cfg', 'num_classes', 'in_chans',
           'img_size']
    for k,v in args.items():
        if (k in own or k.startswith('pretrained')) and k not in ('num_classes', 'in_chans', 'img_size'):
            raise ValueError(f'{k} is no argument of an architecture')
        if not small(v): raise ValueError(f'{k} is too large')
        if re.search('depth|layer|block|repeat', k) and total(v) > 256: raise ValueError(f'{k} is too large')
    # the arguments that are left out follow from the images
    return {k:tuple(v) if isinstance(v, list) else v for k,v in args.items() if k not in own}

def _with_weights(arch, images, args, path, tensors):
    """The backbone with the tensors of the file at `path`, exactly its own but for a classifier's

    The network is first built without memory, so that one larger than its file is refused before it takes any.
    """
    arch,px = arch.partition('.')[0],images['input_size'][-1]
    try:
        with torch.device('meta'): shape = create_backbone(arch, 0, px, **args)
    except Exception as e:
        raise UserError(f'{path.parent}: {arch} cannot be built as is said there ({first_line(e)}): take its files from a copy') from None
    prefixes = shape.pretrained_cfg.get('classifier') or ()
    prefixes = tuple(f'{p}.' for p in ([prefixes] if isinstance(prefixes, str) else prefixes))
    try:
        sizes,_ = read_safetensors(path, header_only=True)
    except Exception as e: raise UserError(f'{path} is damaged ({first_line(e)}): take it from a copy') from None
    def kept(of): return {k:v for k,v in of.items() if not k.startswith(prefixes)}
    check_state(shape, kept(sizes), path)
    found = kept(tensors())
    net = create_backbone(arch, 0, px, **args)
    load_state(net, found, path)
    net.pretrained_cfg = net.pretrained_cfg | images
    return net

def _from_hub(repo):
    "The folder with config.json and model.safetensors of a Hugging Face repository, user/name or user/name@revision"
    repo,_,revision = repo.partition('@')
    try: files = [hf_hub_download(repo, f, revision=revision or None) for f in ('config.json', 'model.safetensors')]
    except EntryNotFoundError:
        raise UserError(f'hf-hub:{repo} lacks config.json or model.safetensors, the only formats that are read: '
                        'ask its author for them') from None
    except Exception as e:
        raise UserError(f'the weights of hf-hub:{repo} cannot be had ({first_line(e)}): check the name and the connection') from None
    return Path(files[0]).parent

def images_of(net):
    "Side, mean and std of the images that a timm network takes, as its `pretrained_cfg` has them"
    cfg = getattr(net, 'pretrained_cfg', None)
    if not cfg or not {'input_size', 'mean', 'std'} <= cfg.keys(): raise UserError(
        f'a {type(net).__name__} does not say what images it takes (pretrained_cfg): '
        'give a timm model, or set input_size, mean and std there')
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
