"""A `FewShotClassifier` on disk: its support and settings in a safetensors file, and the network by name or beside it."""
import copy
import inspect
import json
import re
import shutil
from pathlib import Path

import numpy as np
import timm
import torch

from ..core.errors import UserError, first_line
from ..core.storage import digest, load_tensors, output_folder, save_tensors, user_path
from ..models.pretrained import save_network
from .reading import short_name
from .trust import AUTO

__all__ = ['save_classifier', 'load_classifier']


FILE = 'classifier.safetensors'
FORMAT = 2
MAX_BS = 4096 # largest `bs` in a file, which may come from somebody else
SETTINGS = ('bs', 'px', 'mirror', 'allow_large', 'errors') # arguments of a `FewShotClassifier` that are also its attributes
KINDS = dict(classifier=str, chosen=str, unknown=float | int | None, settings=dict, stats=list, vocab=list, files=list, sha256=str, bs=int,
             px=int, mirror=bool, allow_large=bool, errors=str)


def save_classifier(few, folder):
    """Write the classifier `few` to a folder and return the folder; a classifier that the folder holds already is replaced

    UserError if it cannot be written; the classifier that the folder holds then stays as it is.
    """
    if callable(few.classifier):
        raise UserError('the classifier is a function, which a file cannot hold: register it by register_classifier and give its name')
    if odd := [o for o in few.vocab if type(o) not in (str, int, float, bool)]:
        raise UserError(f'the class {odd[0]!r} is a {type(odd[0]).__name__}, which JSON does not know: give text or numbers as labels')
    by_name = few.network is not None and has_name(few.network)
    sha256 = weights_digest(few.net)
    beside = None if by_name else f'network-{sha256[:8]}'
    files = [f and short_name(f) for f in few.files] # a file that others get does not tell the folders of this machine
    meta = dict(format=FORMAT, network=few.network if by_name else None, sha256=sha256, classifier=few.classifier, settings=few.settings,
                chosen=few.chosen, unknown=few.unknown, stats=[list(v) for v in few.stats], vocab=few.vocab, files=files,
                **{k:getattr(few, k) for k in SETTINGS} | dict(bs=min(few.bs, MAX_BS)))
    try: json.dumps(meta)
    except TypeError as e: raise UserError(f'a setting of the classifier cannot be written ({e}): give numbers or text') from None
    with output_folder(folder, 'the folder') as folder:
        if beside: save_beside(few, folder/beside)
        save_tensors(folder/FILE, dict(h=few.support, y=few.support_y), meta)
        for old in folder.glob('network-*'):
            if old.name != beside: shutil.rmtree(old, ignore_errors=True)
    return folder

def has_name(network):
    "Whether another machine can load the network by its name, which is that of a timm model or of a hub repository and no local path"
    return network.startswith('hf-hub:') or (timm.is_model(network.partition('.')[0]) and not user_path(network).exists())

def save_beside(few, folder):
    "Write the network of `few` to a folder for `load_network`; UserError if it would then give other features for an image"
    image = np.random.default_rng(0).integers(0, 256, (few.px + 20, 2*few.px, 3), np.uint8)
    why = None
    try:
        save_network(few.net, folder, few.px, *few.stats)
        again = type(few)(folder, device=few.device, mirror=few.mirror)
        if not torch.allclose(again.embed(image), few.embed(image), rtol=1e-3, atol=1e-4): why = 'it comes back with other features'
    except UserError as e: why = str(e)
    except (AttributeError, KeyError, TypeError, ValueError) as e: why = f'a {type(few.net).__name__} is no timm model ({first_line(e)})'
    if why: raise UserError(f'the network cannot be saved ({why}): make a timm model of it, or give its name instead of the network')

def weights_digest(net):
    "SHA-256 of the weights of a network without its classifier"
    net = copy.deepcopy(net)
    if hasattr(net, 'reset_classifier'): net.reset_classifier(0)
    return digest(net.state_dict())

def load_classifier(cls, folder, device=None):
    "Load a classifier that `save_classifier` wrote, as a `cls`; UserError if its files are damaged or its network has changed"
    folder = user_path(folder)
    path = folder/FILE
    if not path.is_file(): raise UserError(f'{folder} holds no {FILE}: give a folder that the save of a FewShotClassifier has written')
    tensors,meta = load_tensors(path)
    if meta.get('format') != FORMAT:
        raise UserError(f'{path} has format {meta.get("format")} and this version of grdd_fastai reads {FORMAT}: update grdd_fastai')
    h,y = check_content(cls, path, tensors, meta)
    name = meta['network'] or folder/f'network-{meta["sha256"][:8]}'
    few = cls(name, meta['classifier'], meta['unknown'], stats=meta['stats'], device=device, **{k:meta[k] for k in SETTINGS},
              **meta['settings'])
    if weights_digest(few.net) != meta['sha256']:
        raise UserError(f'the network {name} has other weights than when {folder} was saved: fit the classifier again')
    few.support,few.support_y = h.to(few.device),y.to(few.device)
    few.vocab,few.files,few.chosen,few.photos_here = meta['vocab'],meta['files'],meta['chosen'],False
    return few

def check_content(cls, path:Path, tensors, meta):
    "Return the features and class indices of a saved file; UserError if its parts do not fit together"
    h,y = tensors.get('h'),tensors.get('y')
    fits = (all(isinstance(meta.get(k), kind) for k,kind in KINDS.items()) and h is not None and y is not None and h.ndim == 2
            and h.dtype == torch.float32 and y.shape == h.shape[:1] and y.dtype == torch.int64 and len(meta['files']) == len(h) > 1
            and all(f is None or isinstance(f, str) for f in meta['files']) and bool(h.isfinite().all())
            and sorted(set(y.tolist())) == list(range(len(meta['vocab']))) and len(meta['vocab']) > 1
            and all(isinstance(o, str | int | float) for o in meta['vocab']) and 0 < meta['bs'] <= MAX_BS
            and (meta['chosen'] == meta['classifier'] or (meta['classifier'] == 'auto' and meta['chosen'] in AUTO))
            and re.fullmatch('[0-9a-f]{64}', meta['sha256']) and not inspect.signature(cls).parameters.keys() & meta['settings'].keys()
            and (meta.get('network', 0) is None or (isinstance(meta['network'], str) and has_name(meta['network']))))
    if not fits: raise UserError(f'{path} is damaged or not ours: take it from a copy')
    return h,y
