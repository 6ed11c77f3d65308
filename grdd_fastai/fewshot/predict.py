"""A classifier of images that is made from a few labelled images per class."""
import io
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from fastai.learner import Learner
from fastai.torch_core import default_device
from PIL import Image
from torch import nn

from ..core.device import ieee_float32
from ..core.distributed import backbone_of
from ..core.errors import UserError, first_line
from ..core.storage import MAX_SIDE, read_bytes, user_path
from ..data.archives import IMAGES, Folder
from ..data.images import open_image, upright_rgb
from ..models.create import check_input_config, features, input_config
from ..models.pretrained import load_network
from .classifiers import check_classifier_settings, check_scale, get_classifier
from .evaluate import checked_logits, is_missing

__all__ = ['FewShotClassifier']


class FewShotClassifier:
    """Few-shot classifier of images: `FewShotClassifier('convnet4.grdd_cifarfs').fit(images, labels).predict(others)`

    Nothing is trained: the features of the images are compared. Images are PIL images, paths or uint8 arrays (H, W, 3). A transductive
    classifier uses all images of one `predict` together. UserError for unusable images, labels or settings.
    """
    def __init__(self,
        # a Learner of this package, a timm model, or a name or path for `load_network`
        network:str|Path|nn.Module|Learner='convnet4.grdd_cifarfs',
        classifier:str|Callable='cosine', # name in `CLASSIFIERS`, or function `(support, support_y, query) -> logits`
        bs:int=64, # images embedded at a time
        # side of the network's images in pixels; None: as in its `pretrained_cfg`, where our Learners note that of their data
        px:int|None=None,
        stats:Sequence|None=None, # (mean, std) to normalise images with; None: as in its `pretrained_cfg`
        # device of the network; None: the device of a network that is given, and the fastest device for one that is loaded by name or path
        device:str|torch.device|None=None,
        mirror:bool=False, # average the features of each image with those of its mirror image, which takes twice the time
        allow_large:bool=False, # also decode images of 89 to 179 megapixels
        **settings # settings of the classifier
    ):
        if isinstance(network, Learner): network = backbone_of(network)
        given = isinstance(network, nn.Module)
        self.net = (network if given else load_network(network)).eval()
        if device is not None or not given: self.net.to(as_device(device))
        self.allow_large = allow_large
        self.mirror = mirror
        if not isinstance(bs, int) or bs < 1: raise UserError(f'bs is {bs!r}: it must be at least 1')
        if px is not None and (not isinstance(px, int) or isinstance(px, bool) or not 1 <= px <= MAX_SIDE):
            raise UserError(f'px is {px!r}: it must be from 1 to {MAX_SIDE}')
        side,mean,std = input_config(self.net)
        if px: side = px
        if stats is not None: mean,std = pair_of(stats)
        config = timm.data.resolve_model_data_config(self.net) | dict(input_size=(3, side, side), mean=tuple(mean), std=tuple(std))
        check_classifier_settings(classifier, settings)
        self.transform = timm.data.create_transform(**config)
        self.classifier = get_classifier(classifier)
        self.bs = bs
        self.settings = settings
        self.vocab = None # set by `fit`

    @classmethod
    def from_folder(cls, path:str|Path, *args, **kwargs) -> 'FewShotClassifier':
        "A classifier fitted on a folder that holds one folder of images for each class; UserError if it holds none"
        if not (path := user_path(path)).is_dir():
            raise UserError(f'there is no folder {path}: give one that has a folder of images for each class')
        files = [path/f for f in Folder(path).files if f.count('/') == 1 and IMAGES.search(f)]
        if not files: raise UserError(f'{path} has no folders of images: make one for each class, named after it')
        return cls(*args, **kwargs).fit(files, [f.parent.name for f in files])

    @torch.no_grad()
    def embed(self, images:Iterable|str|Path|Image.Image|np.ndarray) -> torch.Tensor:
        "Features (N, D) in float32 of an image or of a list of N images"
        one = isinstance(images, (str, Path, Image.Image)) or getattr(images, 'ndim', 0) == 3
        device = next(self.net.parameters()).device
        try: images = [images] if one else list(images)
        except TypeError: raise UserError(f'a {type(images).__name__} is no image: give an image or a list of images') from None
        if not images: raise UserError('no image is given: give at least one')
        def batch(at): return torch.stack([self.transform(load_image(im, self.allow_large)) for im in images[at:at+self.bs]])
        with ieee_float32():
            return torch.cat([features(self.net, batch(at).to(device), self.mirror).float() for at in range(0, len(images), self.bs)])

    def fit(self, images:Iterable, labels:Iterable) -> 'FewShotClassifier':
        "Keep the features of a few `images` of each class with their `labels` (text or numbers), and return self"
        try: images,labels = list(images),list(labels)
        except TypeError: raise UserError('images and labels are no lists: give a list of each') from None
        if len(images) != len(labels): raise UserError(f'{len(images)} images and {len(labels)} labels: give a label for each image')
        if not all(isinstance(o, Hashable) for o in labels):
            raise UserError('a label is a list or another collection: give text or numbers')
        if any(is_missing(o) for o in labels):
            raise UserError('a label is missing (None or NaN): give each image one, or leave the image out')
        if len({isinstance(o, str) for o in labels}) > 1: raise UserError('some labels are text and some are not: give all of them as text')
        vocab = sorted(set(labels))
        if len(vocab) < 2: raise UserError(f'all images are of {len(vocab)} class: give images of at least two')
        support = check_scale(self.embed(images))
        # set at the end, so that a failed `fit` changes nothing
        self.vocab = vocab
        self.support = support
        self.support_y = torch.tensor([vocab.index(o) for o in labels], device=support.device)
        return self

    def logits(self, images:Iterable|str|Path|Image.Image|np.ndarray) -> pd.DataFrame:
        "The logits as a DataFrame with a row for each image and a column for each class"
        if self.vocab is None: raise UserError('there are no classes yet: call fit with a few images of each first')
        f = partial(self.classifier, **self.settings)
        out = checked_logits('the classifier', f, self.support[None], self.support_y[None], check_scale(self.embed(images))[None],
                             len(self.vocab))[0]
        return pd.DataFrame(out.cpu().numpy(), columns=self.vocab)

    def predict(self, images:Iterable|str|Path|Image.Image|np.ndarray) -> list:
        "A list with the class of each image"
        return self.logits(images).idxmax(axis=1).tolist()


def as_device(device):
    "The torch device named `device`, or fastai's default device for None; UserError if this machine does not have it"
    if device is None: return default_device()
    try: return torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as e:
        raise UserError(f'the device {device!r} cannot be used ({first_line(e)}): give cpu, cuda or mps, whichever is here') from None

def pair_of(stats):
    "(mean, std) of three numbers each; UserError for anything else"
    try:
        mean,std = stats
        check_input_config(1, list(mean), list(std))
    except (TypeError, ValueError):
        raise UserError(f'stats is {stats!r}: give (mean, std), three numbers each, those of std positive') from None
    return mean,std

def load_image(image, allow_large=False):
    "An upright RGB image from a path, an array or a PIL image; `allow_large` as in `open_image`; UserError if it cannot be read"
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(f'an array of {image.dtype} {image.shape} is no image: give uint8 (H, W, 3)')
        image = Image.fromarray(image)
    if isinstance(image, Image.Image): return upright_rgb(image)
    if not isinstance(image, str | Path): raise UserError(f'a {type(image).__name__} is no image: give a path, a PIL image or an array')
    try: return upright_rgb(open_image(io.BytesIO(read_bytes(image)), allow_large))
    except OSError as e: raise UserError(f'{image} cannot be read as an image ({e.strerror or e}): remove it or replace it') from None
    except Exception as e: raise UserError(f'{image} cannot be read as an image ({e}): remove it or replace it') from None
