"""A few labelled images a class to a classifier of others."""
import io
from collections.abc import Hashable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from fastai.learner import Learner
from PIL import Image
from torch import nn

from ..core.distributed import backbone_of
from ..core.errors import UserError
from ..core.storage import LARGEST_SIDE, read_bytes, user_path
from ..data.archives import IMAGES, Folder
from ..data.images import open_image, upright_rgb
from ..models.create import check_images, features, images_of
from ..models.pretrained import load_network
from .classifiers import check_scale, check_settings_of, get_classifier
from .evaluate import checked_logits, is_missing

__all__ = ['FewShotClassifier']


class FewShotClassifier:
    """`FewShotClassifier('convnet4.grdd_cifarfs').fit(images, labels).predict(others)`: nothing is trained, the features are compared

    Images are PIL images, paths or arrays (H, W, 3) of uint8; transductive classifiers look at all images of a `predict` together.
    """
    def __init__(self,
        network='convnet4.grdd_cifarfs', # a Learner of ours, a timm model with its weights, or a name or path that `load_network` takes
        classifier='cosine', # of `CLASSIFIERS`, or `(support, support_y, query) -> logits`
        bs=64, # images embedded at a time
        px=None, stats=None, # side, and (mean, std), of its images (as its `pretrained_cfg` has them, where a Learner notes its data's)
        allow_large=False, # also decode images of 89 to 179 megapixels
        **settings # of the classifier
    ):
        if isinstance(network, Learner): network = backbone_of(network)
        self.net,self.allow_large = (network if isinstance(network, nn.Module) else load_network(network)).eval(),allow_large
        if not isinstance(bs, int) or bs < 1: raise UserError(f'bs is {bs!r}: it must be at least 1')
        if px is not None and (not isinstance(px, int) or isinstance(px, bool) or not 1 <= px <= LARGEST_SIDE):
            raise UserError(f'px is {px!r}: it must be from 1 to {LARGEST_SIDE}')
        side,mean,std = images_of(self.net)
        if px: side = px
        if stats is not None: mean,std = pair_of(stats)
        config = timm.data.resolve_model_data_config(self.net) | dict(input_size=(3, side, side), mean=tuple(mean), std=tuple(std))
        check_settings_of(classifier, settings)
        self.transform,self.classifier,self.bs,self.settings,self.vocab = (
            timm.data.create_transform(**config),get_classifier(classifier),bs,settings,None)

    @classmethod
    def from_folder(cls, path, *args, **kwargs):
        "Fitted on the images of a folder that has a folder for each class"
        if not (path := user_path(path)).is_dir():
            raise UserError(f'there is no folder {path}: give one that has a folder of images for each class')
        files = [path/f for f in Folder(path).files if f.count('/') == 1 and IMAGES.search(f)]
        if not files: raise UserError(f'{path} has no folders of images: make one for each class, named after it')
        return cls(*args, **kwargs).fit(files, [f.parent.name for f in files])

    @torch.no_grad()
    def embed(self, images):
        "Features (N, D)"
        one,device = isinstance(images, (str, Path, Image.Image)) or getattr(images, 'ndim', 0) == 3,next(self.net.parameters()).device
        try: images = [images] if one else list(images)
        except TypeError: raise UserError(f'a {type(images).__name__} is no image: give an image or a list of images') from None
        if not images: raise UserError('no image is given: give at least one')
        return torch.cat([features(self.net, torch.stack(
                              [self.transform(opened(im, self.allow_large)) for im in images[at:at+self.bs]]).to(device)).float()
                          for at in range(0, len(images), self.bs)])

    def fit(self, images, labels):
        "Remember a few images of each class"
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
        self.vocab,self.support = vocab,support # only now, so that a fit that fails changes nothing
        self.support_y = torch.tensor([vocab.index(o) for o in labels], device=support.device)
        return self

    def logits(self, images):
        "The classifier's logits, a row an image and a column a class"
        if self.vocab is None: raise UserError('there are no classes yet: call fit with a few images of each first')
        f = partial(self.classifier, **self.settings)
        out = checked_logits('the classifier', f, self.support[None], self.support_y[None], check_scale(self.embed(images))[None])[0]
        return pd.DataFrame(out.cpu().numpy(), columns=self.vocab)

    def predict(self, images):
        "The class of each image"
        return self.logits(images).idxmax(axis=1).tolist()


def pair_of(stats):
    "Mean and std, three numbers each, or a UserError"
    try:
        mean,std = stats
        check_images(1, list(mean), list(std))
    except (TypeError, ValueError):
        raise UserError(f'stats is {stats!r}: give (mean, std), three numbers each, those of std positive') from None
    return mean,std

def opened(image, allow_large=False):
    "An upright RGB image of a path, an array or an image; `allow_large` as in `open_image`"
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(f'an array of {image.dtype} {image.shape} is no image: give uint8 (H, W, 3)')
        image = Image.fromarray(image)
    if isinstance(image, Image.Image): return upright_rgb(image)
    if not isinstance(image, str | Path): raise UserError(f'a {type(image).__name__} is no image: give a path, a PIL image or an array')
    try: return upright_rgb(open_image(io.BytesIO(read_bytes(image)), allow_large))
    except OSError as e: raise UserError(f'{image} cannot be read as an image ({e.strerror or e}): remove it or replace it') from None
    except Exception as e: raise UserError(f'{image} cannot be read as an image ({e}): remove it or replace it') from None
