"""A few labelled images a class to a classifier of others."""
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image
from torch import nn

from .errors import UserError
from .evaluate import features
from .inference import get_classifier
from .networks import load_network
from .pack import upright_rgb

__all__ = ['FewShotClassifier']

IMAGES = ('.png', '.jpg', '.jpeg', '.bmp', '.webp')


class FewShotClassifier:
    """`FewShotClassifier('convnet4.grdd_cifarfs').fit(images, labels).predict(others)`: nothing is trained, the features are compared

    Images are PIL images, paths or arrays (H, W, 3) of uint8; transductive classifiers look at all images of a `predict` together.
    """
    def __init__(self,
        network='convnet4.grdd_cifarfs', # timm model with its weights, or a name or path that `load_network` takes
        classifier='cosine', # of `CLASSIFIERS`, or `(support, support_y, query) -> logits`
        bs=64, # images embedded at a time
        **settings # of the classifier
    ):
        self.net,stats = (network, [network.pretrained_cfg[k] for k in ('mean','std')]) if isinstance(network, nn.Module) else load_network(network)
        self.net.eval()
        config = timm.data.resolve_model_data_config(self.net) | dict(mean=tuple(stats[0]), std=tuple(stats[1]))
        self.transform,self.classifier,self.bs,self.settings,self.vocab = timm.data.create_transform(**config),get_classifier(classifier),bs,settings,None

    @classmethod
    def from_folder(cls, path, *args, **kwargs):
        "Fitted on the images of a folder that has a folder for each class"
        files = sorted(f for f in Path(path).expanduser().glob('*/*') if f.suffix.lower() in IMAGES)
        if not files: raise UserError(f'{path} has no folders of images: make one for each class, named after it')
        return cls(*args, **kwargs).fit(files, [f.parent.name for f in files])

    @torch.no_grad()
    def embed(self, images):
        "Features (N, D)"
        images,device = [images] if isinstance(images, (str, Path, Image.Image)) else list(images),next(self.net.parameters()).device
        if not images: raise UserError('no image is given: give at least one')
        return torch.cat([features(self.net, torch.stack([self.transform(opened(im)) for im in images[at:at+self.bs]]).to(device)).float()
                          for at in range(0, len(images), self.bs)])

    def fit(self, images, labels):
        "Remember a few images of each class"
        images,labels = list(images),list(labels)
        if len(images) != len(labels): raise UserError(f'{len(images)} images and {len(labels)} labels: give a label for each image')
        self.vocab = sorted(set(labels))
        if len(self.vocab) < 2: raise UserError(f'all images are of {len(self.vocab)} class: give images of at least two')
        self.support = self.embed(images)
        self.support_y = torch.tensor([self.vocab.index(o) for o in labels], device=self.support.device)
        return self

    def logits(self, images):
        "The classifier's logits, a row an image and a column a class"
        if self.vocab is None: raise UserError('there are no classes yet: call fit with a few images of each first')
        out = self.classifier(self.support[None], self.support_y[None], self.embed(images)[None], **self.settings)[0]
        return pd.DataFrame(out.cpu().numpy(), columns=self.vocab)

    def predict(self, images):
        "The class of each image"
        return self.logits(images).idxmax(axis=1).tolist()


def opened(image):
    "An upright RGB image of a path, an array or an image"
    if isinstance(image, np.ndarray): image = Image.fromarray(image)
    if isinstance(image, Image.Image): return upright_rgb(image)
    try: return upright_rgb(Image.open(image))
    except Exception as e: raise UserError(f'{image} cannot be read as an image ({e}): remove it or replace it') from None
