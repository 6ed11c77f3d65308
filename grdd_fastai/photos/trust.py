"""How far a classifier of photos can be trusted: what it says of its own support photos when they are held out."""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from ..core.device import ieee_float32
from ..core.errors import UserError
from ..fewshot.classifiers import get_classifier, without_settings
from ..fewshot.evaluate import checked_logits
from ..fewshot.inductive import mean_cosine

__all__ = ['HeldOut', 'hold_out', 'expected_accuracy', 'softmax_scale', 'unknown_below', 'similarity', 'choose_classifier', 'AUTO']


REPEATS = 5 # how often each photo is held out, each time together with other photos
MANY = 500 # in a support of more photos than this, each is held out only once
MAX_FOLDS = 50 # parts of the support, of which one is held out at a time
ELEMENTS = 2**25 # numbers that a batch of supports may take
# measured on the validation classes of CIFAR-FS (docs/photos.md): what N photos say is as certain as N*EVIDENCE new ones
EVIDENCE = 0.9
# also from there: errors fall with the number of photos of a class to the power of -LEARNING
LEARNING = 0.25
# also from there: mean and standard deviation of the logarithm of the best scale of logits whose deviations from their mean have the
# root mean square 1, over classifiers, ways and shots from 2 on
LOG_SCALE = 0.7,0.35
AUTO = ('simpleshot_l2n', 'lda', 'logistic', 'ridge', 'cosine') # classifiers that 'auto' chooses from, the preferred one first


@dataclass(frozen=True)
class HeldOut:
    "Mean predictions of a classifier for M photos of its support, each made while the photo was held out of it"
    rows: np.ndarray # (M) the photos, as places in the support; those of classes with one photo are missing
    y: np.ndarray # (M) their classes
    logits: torch.Tensor # (M, C) mean logits
    right: np.ndarray # (M) how often the predicted class was right, from 0 to 1
    similarity: np.ndarray # (M) mean similarity to the most similar class (see `similarity`)


def hold_out(
    classifier:Callable, # inductive classifier, a function `(support, support_y, query) -> logits`
    h:torch.Tensor, # features (N, D) of the support
    y:torch.Tensor, # their classes (N), from 0 to C-1
    seed:int=0, # of the order in which photos are held out
) -> HeldOut:
    """Classify the support photos without themselves

    One photo of each class is held out at a time, or a fiftieth of a larger class, and the others are the support, so that classes of equal
    size stay equal: without the photo alone, its class would have one photo less than the others, to which some classifiers are sensitive.
    All this is done five times, for more than 500 photos once. A class of one photo always stays in the support. UserError if there is no
    other class.
    """
    labels = y.cpu().numpy()
    if (np.bincount(labels) < 2).all():
        raise UserError('each class has one photo, so that none can be held out to measure the classifier: add photos')
    rng = np.random.default_rng(seed)
    folds = [f for _ in range(REPEATS if len(h) <= MANY else 1) for f in parts_of(labels, rng)]
    n_classes = int(labels.max()) + 1
    logits = torch.zeros(len(h), n_classes)
    right,similar,times = np.zeros(len(h)),np.zeros(len(h)),np.zeros(len(h))
    for n in sorted({len(f) for f in folds}):
        same = np.stack([f for f in folds if len(f) == n])
        n_batches = -(-len(same)*len(h)*max(h.shape)//ELEMENTS) # some classifiers need (N, N) numbers for each support
        for held in np.array_split(same, min(n_batches, len(same))):
            stays = np.ones((len(held), len(h)), bool)
            np.put_along_axis(stays, held, False, 1)
            stay = torch.from_numpy(np.nonzero(stays)[1].reshape(len(held), -1)).to(h.device)
            out = torch.from_numpy(held).to(h.device)
            with ieee_float32():
                found = checked_logits('the classifier', classifier, h[stay], y[stay], h[out], n_classes).float().cpu().flatten(0, 1)
            at = held.reshape(-1)
            logits.index_add_(0, torch.from_numpy(at), found)
            np.add.at(right, at, found.argmax(1).numpy() == labels[at])
            np.add.at(similar, at, similarity(h[stay], y[stay], h[out]).reshape(-1))
            np.add.at(times, at, 1)
    rows = np.flatnonzero(times)
    n = times[rows]
    return HeldOut(rows, labels[rows], logits[rows]/torch.from_numpy(n).float()[:, None], right[rows]/n, similar[rows]/n)

def parts_of(labels, rng):
    "Split the photos of classes with several photos into lists, each with one photo of every such class, or a fiftieth of a larger one"
    sizes = np.bincount(labels)
    n = min(sizes.max(), MAX_FOLDS)
    parts = [np.array_split(rng.permutation(np.flatnonzero(labels == c)), min(size, n)) for c,size in enumerate(sizes) if size > 1]
    return [np.concatenate([p[i % len(p)] for p in parts]) for i in range(n)] # a smaller class begins again

def similarity(support, support_y, query):
    "Largest mean cosine of each query with the support photos of a class: (E, NS, D), (E, NS), (E, NQ, D) -> array (E, NQ)"
    return mean_cosine(support, support_y, query).amax(-1).float().cpu().numpy()


def check_share(name, value, example):
    "Raise UserError unless `value` is a number between 0 and 1; the message has the `name` of the argument and an `example`"
    if not isinstance(value, int | float) or not 0 < value < 1:
        raise UserError(f'{name} is {value!r}: it is a share above 0 and below 1, such as {example}')

def check_inductive(classifier):
    "Raise UserError if the classifier, a name or a function, is transductive"
    if getattr(without_settings(get_classifier(classifier)), 'transductive', False):
        raise UserError(f'{classifier} classifies photos together, so that it cannot be measured by one photo at a time: '
                        'choose a classifier that takes each photo by itself, such as simpleshot_l2n')

def lda_has_enough(y):
    "Whether `lda` can still estimate its covariance when one photo of each class is held out, of classes `y` (N)"
    return len(y) >= 3*len(np.unique(y))

def expected_accuracy(held:HeldOut, confidence:float=0.95) -> tuple[float, float, float]:
    """(accuracy, low, high): the accuracy to expect of new photos, from 0 to 1, and its interval, if all classes are equally frequent

    The accuracy is the mean over the classes. The errors are reduced a little, because they are those of supports with one photo of each
    class less than there is. The interval is Wilson's (1927) for as many photos as have the same uncertainty.
    """
    classes,sizes = np.unique(held.y, return_counts=True)
    wrong = np.array([1 - held.right[held.y == c].mean() for c in classes])
    out = np.maximum(1, sizes/MAX_FOLDS) # photos of a class that are held out together
    p = 1 - (wrong*(1 - out/sizes)**LEARNING).mean()
    n = EVIDENCE*len(classes)**2/(1/sizes).sum()
    z = norm.ppf((1 + confidence)/2)
    middle = (p + z*z/(2*n))/(1 + z*z/n)
    half = z*np.sqrt(p*(1 - p)/n + (z/(2*n))**2)/(1 + z*z/n)
    return float(p),float(max(0, middle - half)),float(min(1, middle + half))

def softmax_scale(held:HeldOut) -> float:
    """The number that logits are multiplied by before the softmax, so that probabilities say how often they are right

    It minimises the cross-entropy of the held-out photos, in which all classes have the same weight, and a penalty for leaving what was
    best for other networks and classes.
    """
    spread = float((held.logits - held.logits.mean(1, keepdim=True)).square().mean().sqrt())
    if not spread: return 1.
    z,y = held.logits.double()/spread,torch.from_numpy(held.y)
    sizes = np.bincount(held.y)
    weight = torch.from_numpy(len(held.y)/(np.count_nonzero(sizes)*sizes[held.y]))
    mean,sd = LOG_SCALE
    def loss(log): return float((weight*F.cross_entropy(np.exp(log)*z, y, reduction='none')).sum()) + ((log - mean)/sd)**2/2
    return float(np.exp(minimize_scalar(loss, bounds=(mean - 4, mean + 4), method='bounded').x)/spread)

def unknown_below(held:HeldOut, rate:float) -> float:
    """The similarity below which a photo is called unknown, such that the share `rate` of photos of known classes is lost (conformal)

    UserError if there are too few photos to tell.
    """
    place = rate*(len(held.similarity) + 1)
    if place < 1:
        n,need = len(held.similarity),int(np.ceil(1/rate - 1 - 1e-9))
        least = np.ceil(100/(n + 1))/100
        raise UserError(f'unknown={rate:g} needs {need} photos in classes of two or more, and there are {n}: add photos, '
                        f'or give unknown={least:g}')
    known = np.sort(held.similarity)
    return float(np.interp(place - 1, np.arange(len(known)), known))

def choose_classifier(classifiers:dict, h:torch.Tensor, y:torch.Tensor) -> str:
    """Name of the classifier that is most often right about held-out photos

    `classifiers` is a dict name -> function, the preferred one first. Another one is chosen only if it is better by more than one standard
    error of the difference, on the same photos.
    """
    best = None
    for name,f in classifiers.items():
        held = hold_out(f, h, y)
        if best is not None:
            classes,sizes = np.unique(held.y, return_counts=True)
            gains = [held.right[held.y == c] - best[1][held.y == c] for c in classes]
            error = np.sqrt(sum(g.var()/n for g,n in zip(gains, sizes)))/len(classes) # of the mean over the classes
            if np.mean([g.mean() for g in gains]) <= error: continue
        best = name,held.right
    return best[0]
