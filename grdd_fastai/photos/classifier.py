"""A classifier of photos that is made from a few labelled photos of each class."""
import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from fastai.learner import Learner
from fastai.torch_core import default_device
from torch import nn

from ..core.device import ieee_float32
from ..core.distributed import backbone_of
from ..core.errors import UserError, first_line
from ..core.storage import MAX_SIDE, user_path
from ..fewshot.classifiers import CLASSIFIERS, check_classifier_settings, check_scale, get_classifier, without_settings
from ..fewshot.evaluate import checked_logits, is_missing
from ..models.create import check_input_config, features, input_config
from ..models.pretrained import load_network
from .check import SupportCheck, check_support
from .reading import UnreadablePhoto, check_ordered, list_photos, load_photos, photo_name, photos_below, warn_of
from .saving import load_classifier, save_classifier
from .trust import AUTO, check_inductive, check_share, choose_classifier, hold_out, lda_has_enough, similarity, softmax_scale, unknown_below

__all__ = ['FewShotClassifier', 'make_classifier', 'UNKNOWN']


UNKNOWN = 'unknown' # the class of a photo that is like none of the classes


class FewShotClassifier:
    """Few-shot classifier of photos: `FewShotClassifier('convnet4.grdd_cifarfs').fit(photos, labels).predict(others)`

    Nothing is trained: the features of the photos are compared. Photos are whatever `list_photos` takes: files, folders, patterns, PIL
    images, arrays, tensors. A photo that cannot be read is left out with a warning. A transductive classifier uses all photos of one
    `predict` together. UserError for unusable photos, labels or settings.
    """
    def __init__(self,
        # a Learner of this package or a timm model (it is copied), or a name or path for `load_network`
        network:str|Path|nn.Module|Learner='convnet4.grdd_cifarfs',
        # name in `CLASSIFIERS`; 'auto' to choose the one that is best on held-out support photos; or function
        # `(support, support_y, query) -> logits`
        classifier:str|Callable=AUTO[0],
        # share of photos of known classes that may be called 'unknown', so that photos of other classes are; None: no photo is unknown
        unknown:float|None=None,
        bs:int=64, # photos embedded at a time
        # side of the images in pixels; None: the side in the network's `pretrained_cfg`, where our Learners write that of their data
        px:int|None=None,
        stats:Sequence|None=None, # (mean, std) to normalise images with; None: as in its `pretrained_cfg`
        # device of the network; None: the device of a network that is given, and the fastest device for one that is loaded by name or path
        device:str|torch.device|None=None,
        mirror:bool=False, # average the features of each photo with those of its mirror image, which takes twice the time
        allow_large:bool=False, # also decode images of 89 to 179 megapixels
        errors:str='skip', # what an unreadable photo does: 'skip' leaves it out with a warning, 'raise' stops
        **settings # settings of the classifier
    ):
        if isinstance(network, Learner): network = backbone_of(network)
        given = isinstance(network, nn.Module)
        check_side(px)
        self.net = (copy.deepcopy(network) if given else load_network(network, px)).eval()
        self.network = None if given else str(network) # the name or path by which the network was loaded
        if device is not None or not given: self.net.to(as_device(device))
        if errors not in ('skip', 'raise'): raise UserError(f"errors is {errors!r}: it is 'skip' or 'raise'")
        if not isinstance(bs, int) or bs < 1: raise UserError(f'bs is {bs!r}: it must be at least 1')
        self.bs,self.mirror,self.allow_large,self.errors = bs,mirror,allow_large,errors
        self.px,self.stats = px,stats if stats is None else pair_of(stats)
        if px is None or stats is None:
            side,*own = input_config(self.net)
            self.px,self.stats = px or side,self.stats or tuple(own)
        mean,std = (tuple(v) for v in self.stats)
        config = timm.data.resolve_model_data_config(self.net) | dict(input_size=(3, self.px, self.px), mean=mean, std=std)
        self.transform = timm.data.create_transform(**config)
        self._check_network()
        if unknown is not None: check_share('unknown', unknown, 0.05)
        self.unknown,self.classifier,self.settings = unknown,classifier,settings
        if classifier != 'auto': check_classifier_settings(classifier, settings)
        elif settings: raise UserError(f"classifier='auto' takes no settings, and {next(iter(settings))!r} is one: name the classifier")
        self.chosen = classifier # by 'auto', `fit` chooses another one each time
        # `fit` sets the classes, and for each support photo its features, the index of its class in `vocab`, and its file
        self.vocab = self.support = self.support_y = self.files = self._held = None
        self.photos_here = True # False for a loaded classifier, because its photos may be on another machine

    def _check_network(self):
        "Set the number of features `n_features`; UserError unless the network gives a vector of features for a blank image"
        try:
            with torch.no_grad(): h = features(self.net, torch.zeros(1, 3, self.px, self.px, device=self.device))
            if h.ndim != 2: raise ValueError(f'its output has the shape {tuple(h.shape)}')
        except Exception as e:
            raise UserError(f'the network makes no features of an image of {self.px} px ({first_line(e)}): '
                            'leave px out, or give another network') from None
        self.n_features = h.shape[1]

    @property
    def device(self): return next(self.net.parameters()).device

    # ---- the support --------------------------------------------------------------------------------------------------

    @classmethod
    def from_folder(cls, path:str|Path, *args, **kwargs) -> 'FewShotClassifier':
        "A classifier fitted on a folder that holds one folder of photos for each class; UserError if it holds none"
        if not (path := user_path(path)).is_dir():
            raise UserError(f'there is no folder {path}: give one that has a folder of images for each class')
        files = [f for f in photos_below(path) if f.parent.parent == path]
        if not files: raise UserError(f'{path} has no folders of images: make one for each class, named after it')
        classes = {f.parent.name for f in files}
        if empty := sorted(d.name for d in path.iterdir() if d.is_dir() and not d.name.startswith('.') and d.name not in classes):
            raise UserError(f'{path/empty[0]} holds no photos that can be read: put some into it, as JPEG or PNG, or remove the folder')
        return cls(*args, **kwargs).fit(files, [f.parent.name for f in files])

    @classmethod
    def from_df(cls, df:pd.DataFrame, *args, folder:str|Path='.', x:str='filename', y:str='label', **kwargs) -> 'FewShotClassifier':
        "A classifier fitted on a table with the columns `x`, files relative to `folder`, and `y`, classes"
        for column in (x, y):
            if column not in df.columns:
                names = ', '.join(map(str, df.columns))
                raise UserError(f'the table has no column {column!r}, only {names}: name the columns of files and classes by x and y')
        if missing := int(df[x].isna().sum()): raise UserError(f'{missing} rows of the table have no file: fill them in or leave them out')
        folder = user_path(folder)
        return cls(*args, **kwargs).fit([folder/str(f) for f in df[x]], df[y].tolist())

    @classmethod
    def from_csv(cls, path:str|Path, *args, folder:str|Path|None=None, **kwargs) -> 'FewShotClassifier':
        "A classifier fitted on a CSV file as in `from_df`; its files are relative to `folder`, by default the CSV's own folder"
        path = user_path(path)
        try: df = pd.read_csv(path, dtype=str)
        except (OSError, ValueError) as e: raise UserError(f'{path} cannot be read as a CSV ({first_line(e)}): replace it') from None
        return cls.from_df(df, *args, folder=path.parent if folder is None else folder, **kwargs)

    def fit(self, photos, labels:Iterable) -> 'FewShotClassifier':
        "Keep the features of a few `photos` of each class with their `labels` (text or numbers), and return self"
        return self._keep(*self._embed_labelled(photos, labels))

    def partial_fit(self, photos, labels:Iterable) -> 'FewShotClassifier':
        "Add photos of classes that are there or new; without classes yet, the same as `fit`"
        if self.vocab is None: return self.fit(photos, labels)
        h,labels,files = self._embed_labelled(photos, labels)
        return self._keep(torch.cat([self.support.to(h.device), h]), [*self._labels(), *labels], [*self.files, *files])

    def add(self, photos, label) -> 'FewShotClassifier':
        "Add photos of one class, which may be new"
        photos = list_photos(photos)
        return self.partial_fit(photos, [label]*len(photos))

    def remove(self, label) -> 'FewShotClassifier':
        "Remove a class with its photos; at least two classes must stay"
        self._check_fitted()
        if label not in self.vocab: raise UserError(f'there is no class {label!r}: the classes are {names_of(self.vocab)}')
        if len(self.vocab) == 2: raise UserError('at least two classes must stay: add another before you remove this one')
        labels = self._labels()
        keep = [i for i,o in enumerate(labels) if o != label]
        return self._keep(self.support[keep], [labels[i] for i in keep], [self.files[i] for i in keep])

    def _labels(self): return [self.vocab[i] for i in self.support_y.tolist()]

    def _check_fitted(self):
        if self.vocab is None: raise UserError('there are no classes yet: call fit with a few images of each first')

    def _embed_labelled(self, photos, labels):
        "Features, labels and files of the photos that can be read; UserError if a class has none"
        photos,labels = labelled(photos, labels)
        h,problems = self._embed(photos)
        if len(problems) == len(photos): raise UserError(f'none of the photos can be read: {problems[0]}')
        read = [i for i in range(len(photos)) if i not in problems]
        kept = [labels[i] for i in read]
        if (lost := next((i for i in problems if labels[i] not in kept), None)) is not None:
            raise UserError(f'no photo of class {labels[lost]!r} can be read: {problems[lost]}')
        return h[read],kept,[photo_name(photos[i]) for i in read]

    def _keep(self, h, labels, files):
        "Replace the support by these features, labels and files; UserError if they are not valid, and the old support then stays"
        check_labels(labels)
        try: vocab = sorted(set(labels))
        except TypeError: raise UserError('the labels cannot be sorted: give all of them as text') from None
        if len(vocab) < 2: raise UserError(f'all images are of {len(vocab)} class: give images of at least two')
        if self.unknown is not None and UNKNOWN in vocab:
            raise UserError(f'a class is called {UNKNOWN!r}, as photos of no class are: give it another name, or leave out unknown=')
        y = torch.tensor([vocab.index(o) for o in labels], device=check_scale(h).device)
        if self.classifier == 'auto':
            several = (torch.bincount(y) > 1).any() # otherwise no photo can be held out
            names = [k for k in AUTO if k != 'lda' or lda_has_enough(y.cpu())]
            self.chosen = choose_classifier({k:get_classifier(k) for k in names}, h, y) if several else AUTO[0]
        self.support,self.support_y,self.vocab,self.files,self._held = h,y,vocab,files,None
        return self

    @property
    def _function(self): return partial(get_classifier(self.chosen), **self.settings)

    def held_out(self):
        "The `HeldOut` of the support: what the classifier says of its own photos when they are held out; UserError if none can be"
        self._check_fitted()
        check_inductive(self.chosen)
        if without_settings(get_classifier(self.chosen)) is CLASSIFIERS['lda'] and not lda_has_enough(self.support_y.cpu()):
            raise UserError('lda cannot be measured with fewer than three photos of a class on average: add photos, or take simpleshot_l2n')
        if self._held is None: self._held = hold_out(self._function, self.support, self.support_y)
        return self._held

    def check(self, confidence:float=0.95) -> SupportCheck:
        """Check the support: the accuracy to expect, the confusion of classes, labels that may be wrong, photos that are there twice

        Print it for a summary. UserError if each class has one photo, and for a transductive classifier.
        """
        check_share('confidence', confidence, 0.95)
        held = self.held_out() # an error if there is no support
        names = [f or f'photo {i}' for i,f in enumerate(self.files)]
        return check_support(held, self.support, self.support_y, self.vocab, names, confidence)

    # ---- predictions --------------------------------------------------------------------------------------------------

    def embed(self, photos) -> torch.Tensor:
        "Features (N, D) in float32 of a photo or of several; NaN for a photo that cannot be read"
        return self._embed(list_photos(photos))[0]

    @torch.no_grad()
    def _embed(self, photos):
        "Return the features (N, D) of a list of photos, and a dict from the index of each unreadable photo to its error"
        device = self.device
        parts,problems,batch,rows = [],{},[],[]
        def flush():
            if not batch: return
            with ieee_float32(): parts.append(features(self.net, torch.stack(batch).to(device), self.mirror).float())
            batch.clear()
        for i,loaded in enumerate(load_photos(photos, self.transform, self.allow_large, self.errors)):
            if isinstance(loaded, UnreadablePhoto): problems[i] = loaded
            else:
                batch.append(loaded)
                rows.append(i)
            if len(batch) == self.bs: flush()
        flush()
        warn_of(problems.values(), len(photos))
        h = torch.full((len(photos), self.n_features), torch.nan, device=device)
        if parts: h[rows] = torch.cat(parts)
        return h,problems

    def logits(self, photos) -> pd.DataFrame:
        "The logits as a DataFrame with a row for each photo and a column for each class; NaN for a photo that cannot be read"
        self._check_fitted()
        return self._logits(*self._embed(list_photos(photos)))

    def _logits(self, h, problems):
        "`logits` of photos with the features `h` (N, D); `problems` has the index of each unreadable photo"
        read = [i for i in range(len(h)) if i not in problems]
        out = np.full((len(h), len(self.vocab)), np.nan, np.float32)
        if read:
            f = self._function
            support,support_y,query = self.support.to(h.device)[None],self.support_y.to(h.device)[None],check_scale(h[read])[None]
            out[read] = checked_logits('the classifier', f, support, support_y, query, len(self.vocab))[0].cpu().numpy()
        return pd.DataFrame(out, columns=self.vocab)

    def predict_proba(self, photos) -> pd.DataFrame:
        """The probability of each class (columns) for each photo (rows); NaN for a photo that cannot be read

        The probabilities are calibrated by the support photos, held out in turn: of photos with probability 0.8, eight in ten are right.
        UserError if each class has one photo, and for a transductive classifier.
        """
        held = self.held_out()
        return probabilities(self.logits(photos), softmax_scale(held))

    def _limit(self):
        "The similarity below which a photo is unknown; it is asked for before photos are read, so that its UserError comes first"
        self._check_fitted()
        return -np.inf if self.unknown is None else unknown_below(self.held_out(), self.unknown)

    def _is_known(self, h, limit):
        "For each of the features (N, D): whether its similarity to the most similar class is at least `limit`"
        if self.unknown is None: return np.ones(len(h), bool)
        return similarity(self.support.to(h.device)[None], self.support_y.to(h.device)[None], h.nan_to_num()[None])[0] >= limit

    def predict(self, photos) -> list:
        "A list with the class of each photo; with `unknown=`, 'unknown' for a photo like none of them; None for one that cannot be read"
        limit = self._limit()
        h,problems = self._embed(list_photos(photos))
        return [c if known or c is None else UNKNOWN for c,known in zip(classes_of(self._logits(h, problems)), self._is_known(h, limit))]

    def predict_table(self, photos) -> pd.DataFrame:
        """A DataFrame with a row for each photo

        Its columns are the `file`; the `class`, 'unknown' for a photo that is like none of the classes; the `probability` of the most
        probable class, NaN where it cannot be calibrated (see `predict_proba`); the `runner_up`, the most probable class beside the one
        in the column `class`; `nearest`, the file of the support photo of the most probable class with the most similar features, or its
        place in the support if it has no file; `distance`, 1 minus the cosine to it; and `problem`, why a photo cannot be read, or an empty
        text.
        """
        limit = self._limit()
        photos = list_photos(photos)
        return self._table(photos, *self._embed(photos), limit)

    def _table(self, photos, h, problems, limit):
        "`predict_table` of photos with the features `h` (N, D), the errors of unreadable ones, and the similarity that known ones have"
        logits = self._logits(h, problems)
        try: probability = probabilities(logits, softmax_scale(self.held_out()))
        except UserError: probability = logits*np.nan
        with ieee_float32(): similar = (F.normalize(h, dim=1) @ F.normalize(self.support.to(h.device), dim=1).T).cpu().numpy()
        support_y,rows = self.support_y.cpu().numpy(),[]
        for i,(photo,best,known) in enumerate(zip(photos, classes_of(logits), self._is_known(h, limit))):
            row = {'file':photo_name(photo), 'class':best, 'probability':np.nan, 'runner_up':None, 'nearest':None, 'distance':np.nan,
                   'problem':str(problems.get(i, ''))}
            if i not in problems:
                of_class = np.flatnonzero(support_y == self.vocab.index(best))
                nearest = of_class[similar[i, of_class].argmax()]
                second = logits.iloc[i].drop(best).idxmax()
                row |= {'class':best if known else UNKNOWN, 'probability':probability[best][i], 'runner_up':second if known else best,
                        'nearest':self.files[nearest] or str(nearest), 'distance':float(1 - similar[i, nearest])}
            rows.append(row)
        table = pd.DataFrame(rows, dtype=object) # so that classes that are numbers stay what they are
        return table.assign(probability=table.probability.astype(float), distance=table.distance.astype(float))

    def show_results(self, photos, n:int=12):
        "Draw the first `n` photos with their classes, each above the most similar support photo of its class (`plot_photos`)"
        from .report import plot_photos
        plot_photos(self, photos, n)

    def score(self, photos, labels:Iterable) -> float:
        "The share of photos whose class is predicted right, from 0 to 1; photos that cannot be read do not count"
        self._check_fitted()
        photos,labels = labelled(photos, labels)
        if not set(labels) & set(self.vocab):
            raise UserError(f'no label is one of the classes, {names_of(self.vocab)}: give the labels as they were given to fit')
        predicted = [(p, y) for p,y in zip(self.predict(photos), labels) if p is not None]
        if not predicted: raise UserError('none of the photos can be read: give others')
        return sum(p == y for p,y in predicted)/len(predicted)

    # ---- on disk ------------------------------------------------------------------------------------------------------

    def save(self, folder:str|Path) -> Path:
        """Write the classifier to a folder that `load` reads, here or on another machine, without the photos

        A network that was given by the name of a timm model is saved by its name and checksum, any other network beside the rest.
        """
        self._check_fitted()
        return save_classifier(self, folder)

    def export_onnx(self, folder:str|Path) -> Path:
        "Write the classifier as an ONNX file, with a small program that needs no PyTorch: `grdd_fastai.photos.export.export_onnx`"
        from .export import export_onnx
        return export_onnx(self, folder)

    @classmethod
    def load(cls, folder:str|Path, device:str|torch.device|None=None) -> 'FewShotClassifier':
        "Load a classifier that `save` wrote; UserError if its files are damaged or its network has other weights now"
        return load_classifier(cls, folder, device)


def make_classifier(support:str|None=None, load:str|None=None, **settings) -> FewShotClassifier:
    """A classifier of the classes in the folder `support`, or the one saved in the folder `load`, or one without classes yet

    `settings` are arguments of `FewShotClassifier`, of which those that are None are left out. UserError for both folders, and for settings
    of a saved classifier.
    """
    given = {k:v for k,v in settings.items() if v is not None}
    if support and load: raise UserError('support and load are both given: give a folder of examples, or a saved classifier')
    if load and given: raise UserError(f'{next(iter(given))} cannot be given with load: a saved classifier has its own')
    if load: return FewShotClassifier.load(load)
    return FewShotClassifier.from_folder(support, **given) if support else FewShotClassifier(**given)

def classes_of(logits):
    "The class of each row of a DataFrame of logits; None for a row of NaN"
    vocab,found = list(logits.columns),logits.to_numpy()
    return [None if np.isnan(row).any() else vocab[row.argmax()] for row in found]

def probabilities(logits, scale):
    "Multiply a DataFrame of logits by `scale` and take the softmax of each row"
    p = torch.from_numpy(logits.to_numpy()*np.float32(scale)).softmax(1).numpy()
    return pd.DataFrame(p, columns=logits.columns, index=logits.index)

def names_of(vocab): return ', '.join(map(str, vocab))

def labelled(photos, labels):
    "Photos and labels as two lists of equal length; a single text is the label of a single photo; UserError if they do not fit"
    photos = list_photos(photos)
    check_ordered(labels, 'labels')
    try: labels = [labels] if isinstance(labels, str) else labels.tolist() if hasattr(labels, 'tolist') else list(labels)
    except TypeError: raise UserError('images and labels are no lists: give a list of each') from None
    labels = [o.item() if isinstance(o, np.generic) else o for o in (labels if isinstance(labels, list) else [labels])]
    if len(photos) != len(labels): raise UserError(f'{len(photos)} images and {len(labels)} labels: give a label for each image')
    check_labels(labels)
    return photos,labels

def check_labels(labels):
    "Raise UserError for labels that cannot be names of classes, and for text beside numbers"
    if not all(isinstance(o, Hashable) and not isinstance(o, torch.Tensor) for o in labels):
        raise UserError('a label is a list or another collection: give text or numbers')
    if any(is_missing(o) for o in labels):
        raise UserError('a label is missing (None or NaN): give each image one, or leave the image out')
    if len({isinstance(o, str) for o in labels}) > 1: raise UserError('some labels are text and some are not: give all of them as text')

def as_device(device):
    "The torch device named `device`, or fastai's default device for None; UserError if this machine does not have it"
    if device is None: return default_device()
    try: return torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as e:
        raise UserError(f'the device {device!r} cannot be used ({first_line(e)}): give cpu, cuda or mps, whichever is here') from None

def check_side(px):
    "Raise UserError if `px` is neither None nor a side of images"
    if px is not None and (not isinstance(px, int) or isinstance(px, bool) or not 1 <= px <= MAX_SIDE):
        raise UserError(f'px is {px!r}: it must be from 1 to {MAX_SIDE}')

def pair_of(stats):
    "(mean, std) of three numbers each; UserError for anything else"
    try:
        mean,std = stats
        check_input_config(1, list(mean), list(std))
    except (TypeError, ValueError):
        raise UserError(f'stats is {stats!r}: give (mean, std), three numbers each, those of std positive') from None
    return mean,std
