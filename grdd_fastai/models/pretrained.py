"""Trained networks by name or path, and the files with their weights."""
import copy
import inspect
import re
import tempfile
from pathlib import Path

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save
from timm.models._hub import save_config_for_hf

from ..core.errors import UserError, first_line
from ..core.hub import quick_offline
from ..core.storage import atomic_write, check_state, digest, load_state, on_cpu, read_json, read_safetensors, user_path, write_json
from .create import check_backbone, check_input_config, create_backbone, not_on_this_machine, pretrained_tag

__all__ = ['load_network', 'save_network', 'save_weights', 'load_weights']


RUNS = ('net', 'student_grdd') # names of the network that a run saves
PICKLES = ('.bin', '.pth', '.pt', '.ckpt', '.pkl', '.pickle', '.tar', '.npz', '.h5')


def load_network(
    name:str|Path,
    # side of the images in pixels for which a timm model is built that has one fixed side; None: the side in its `pretrained_cfg`
    px:int|None=None,
) -> torch.nn.Module:
    """The trained network with the name or path `name`, without a classifier

    It names a timm model with pretrained weights, a folder of recipes/publish.py, `hf-hub:user/name`, the folder of a run, or weights in
    such a folder (`runs/grdd/student_cl`). The `pretrained_cfg` of the network has the side, mean and std of its images. Published
    weights are read only from `model.safetensors`, and they must match exactly the network that `config.json` describes. UserError if it is
    none of these.
    """
    path = user_path(str(name).removesuffix('.safetensors'), 'the network')
    cards = [*(path/f'{net}.json' for net in RUNS), *([path.with_name(f'{path.name}.json')] if path.name else [])]
    if card := next((c for c in cards if c.is_file() and c.with_suffix('.safetensors').is_file()), None): return _of_a_run(card)
    if str(name).startswith('hf-hub:'): return _of_a_folder(_from_hub(str(name).removeprefix('hf-hub:')))
    if (path/'config.json').exists(): return _of_a_folder(path)
    if path.exists():
        raise UserError(f'{path} holds no network (net.json or config.json): give the folder of a run or of recipes/publish.py')
    side = timm.get_pretrained_cfg(pretrained_tag(str(name), True)).input_size[-1] if timm.is_model(str(name).partition('.')[0]) else 32
    return create_backbone(str(name), px=px or side, pretrained=True)

def _of_a_run(card):
    "The network that a run saved with the JSON file `card`"
    try:
        about = read_json(card, keys=dict(arch=str, px=int, stats=list))
        mean,std = about['stats']
        config = check_input_config(about['px'], mean, std, **about.get('crop', {}))
        check_backbone(about['arch'])
    except (UserError, TypeError, ValueError) as e:
        raise UserError(f'{card} is damaged or no network\'s ({first_line(e)}): give the folder of a run') from None
    return _with_weights(about['arch'], config, {}, card.with_suffix('.safetensors'), lambda: read_weights(card.with_suffix(''))[1])

def _of_a_folder(folder):
    "The network of a folder with config.json and model.safetensors"
    weights = folder/'model.safetensors'
    config = read_json(folder/'config.json', keys=dict(architecture=str))
    if not weights.is_file():
        other = next((f.name for f in sorted(folder.iterdir()) if f.suffix in PICKLES), None)
        advice = f' but {other}, a format that can run any program when it is read: ask its author for safetensors'
        raise UserError(f'{folder} has no model.safetensors' + (advice if other else ': take it from a copy'))
    try:
        cfg = config.get('pretrained_cfg', config)
        c,*sides = cfg['input_size']
        if c != 3 or len(sides) != 2 or sides[0] != sides[1]:
            size = ' x '.join(map(str, (c, *sides)))
            raise ValueError(f'its images are {size}, not RGB squares')
        images = check_input_config(sides[0], cfg['mean'], cfg['std'], cfg.get('crop_pct', 1.), cfg.get('interpolation', 'bicubic'),
                                    cfg.get('crop_mode', 'center'))
        args = _arguments(config.get('model_args') or {})
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise UserError(f'{folder/"config.json"} does not describe a network ({type(e).__name__}: {first_line(e)}): '
                        'take it from a copy') from None
    check_backbone(config['architecture'])
    def tensors():
        try: return read_safetensors(weights)[0]
        except Exception as e: raise UserError(f'{weights} is damaged ({first_line(e)}): take it from a copy') from None
    return _with_weights(config['architecture'], images, args, weights, tensors)

def _arguments(args):
    "The arguments of an architecture from an untrusted file; ValueError for large values and for arguments of timm itself"
    def small(v, depth=2):
        if isinstance(v, list): return depth and len(v) <= 64 and all(small(o, depth-1) for o in v)
        return v is None or isinstance(v, bool) or (isinstance(v, str) and len(v) <= 100) or (isinstance(v, int | float) and abs(v) <= 4096)
    def total(v): return sum(map(total, v)) if isinstance(v, list) else v if isinstance(v, int) else 0
    own = [*inspect.signature(timm.create_model).parameters, 'features_only', 'out_indices', 'feature_cfg', 'num_classes', 'in_chans',
           'img_size']
    for k,v in args.items():
        # arguments of timm itself can name files
        if (k in own or k.startswith('pretrained')) and k not in ('num_classes', 'in_chans', 'img_size'):
            raise ValueError(f'{k} is no argument of an architecture')
        if not small(v): raise ValueError(f'{k} is too large')
        if re.search('depth|layer|block|repeat', k) and total(v) > 256: raise ValueError(f'{k} is too large')
    # `num_classes`, `in_chans` and `img_size` are left out: they follow from the images
    return {k:tuple(v) if isinstance(v, list) else v for k,v in args.items() if k not in own}

def _with_weights(arch, images, args, path, tensors):
    """The backbone `arch` with the tensors of the file at `path`; UserError unless they match exactly, apart from a classifier

    The network is first built without memory, so that a network larger than its file is refused before it takes memory.
    """
    arch = arch.partition('.')[0]
    px = images['input_size'][-1]
    try:
        with torch.device('meta'): shape = create_backbone(arch, 0, px, **args)
    except Exception as e:
        raise UserError(f'{path.parent}: {arch} cannot be built as is said there ({first_line(e)}): take its files from a copy') from None
    prefixes = shape.pretrained_cfg.get('classifier') or ()
    prefixes = tuple(f'{p}.' for p in ([prefixes] if isinstance(prefixes, str) else prefixes))
    try:
        sizes,_ = read_safetensors(path, header_only=True)
    except Exception as e: raise UserError(f'{path} is damaged ({first_line(e)}): take it from a copy') from None
    def kept(state): return {k:v for k,v in state.items() if not k.startswith(prefixes)}
    check_state(shape, kept(sizes), path)
    found = kept(tensors())
    net = create_backbone(arch, 0, px, **args)
    load_state(net, found, path)
    net.pretrained_cfg = net.pretrained_cfg | images
    return net

def _from_hub(repo):
    "Download config.json and model.safetensors of a Hugging Face repository, user/name or user/name@revision, and return their folder"
    repo,_,revision = repo.partition('@')
    with quick_offline() as online:
        try: files = [hf_hub_download(repo, f, revision=revision or None) for f in ('config.json', 'model.safetensors')]
        except Exception as e:
            if not online: raise not_on_this_machine(f'the weights of hf-hub:{repo}') from None
            if isinstance(e, EntryNotFoundError):
                raise UserError(f'hf-hub:{repo} lacks config.json or model.safetensors, the only formats that are read: '
                                'ask its author for them') from None
            raise UserError(f'the weights of hf-hub:{repo} cannot be loaded ({first_line(e)}): check the name') from None
    return Path(files[0]).parent

def save_network(net, folder, px, mean, std, **cfg):
    """Write `model.safetensors` and timm's `config.json` of a timm model, without its classifier, for images of side `px` with mean and std

    Further entries of its `pretrained_cfg` are given by keyword. `load_network` and timm's `local-dir:` read the folder.
    """
    folder = Path(folder)
    net = copy.deepcopy(net).cpu().eval()
    net.reset_classifier(0)
    data = timm.data.resolve_model_data_config(net) | dict(input_size=(3, px, px), mean=tuple(mean), std=tuple(std))
    with tempfile.TemporaryDirectory() as tmp:
        save_config_for_hf(net, Path(tmp)/'config.json', dict(pretrained_cfg=dict(input_size=(3, px, px)) | cfg), data_config=data)
        config = (Path(tmp)/'config.json').read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder/'model.safetensors', save(on_cpu(net.state_dict()), metadata=dict(format='pt')))
    atomic_write(folder/'config.json', config)

def save_weights(model, path, **card):
    "Write the weights of `model` to `path`.safetensors, and `card` with their checksum to `path`.json; same weights give the same bytes"
    tensors = on_cpu(model.state_dict())
    atomic_write(f'{path}.safetensors', save(tensors, metadata=dict(format='pt')))
    write_json(f'{path}.json', card | dict(sha256=digest(tensors)))

def load_weights(model, path):
    "Load the files of `save_weights` into `model` and return their card; UserError if they are damaged or do not fit"
    card,tensors = read_weights(path, dict(val_accuracy=(int, float)))
    load_state(model, tensors, f'{path}.safetensors')
    return card

def read_weights(path, keys=None):
    "The card and the tensors that `save_weights` wrote; UserError if the checksum is wrong or the card lacks one of `keys` (name -> type)"
    card = read_json(f'{path}.json', keys=dict(sha256=str) | (keys or {}))
    try:
        tensors,_ = read_safetensors(f'{path}.safetensors')
        if card['sha256'] != digest(tensors): raise ValueError('the checksum is wrong')
    except Exception as e:
        raise UserError(f'{path}.safetensors and its .json cannot be used ({first_line(e)}): '
                        'remove both, or take them from a copy') from None
    return card,tensors
