"""Classifiers on features by name: the registry, its checks, and what the classifiers share

A classifier is a function `(support, support_y, query, ...) -> logits`, stateless and batched over episodes. Shapes: E episodes, NS support
and NQ query images, D features, C classes; support (E, NS, D), support_y 0..C-1 (E, NS), query (E, NQ, D), logits (E, NQ, C), whose argmax
is the prediction. Episodes do not see each other, and everything is computed in float32. A registered classifier raises UserError for
features that are not finite and for a class without support images.
"""
import inspect
from functools import partial, wraps

import torch
import torch.nn.functional as F

from ..core.errors import UserError
from ..losses import full_precision

__all__ = ['CLASSIFIERS', 'register_classifier', 'check_settings_of', 'get_classifier', 'with_base_mean', 'prototypes']


CLASSIFIERS = {} # name -> function with `transductive` and `balanced`: whether it takes every class to have equally many queries


def register_classifier(name, transductive=False, balanced=False, at_once=1):
    """Register a classifier: its arguments are checked and in float32, its logits finite

    `at_once`: how many times as many episodes as others it likes to have together, since it repeats cheap steps until the last is done.
    """
    def register(f):
        inner = full_precision(f)
        @wraps(f)
        def checked(support, support_y, query, **settings):
            if (support.ndim != 3 or query.ndim != 3 or support_y.shape != support.shape[:2] or len(query) != len(support)
                or query.shape[2] != support.shape[2]):
                raise UserError(f'{name} takes support (E, NS, D), support_y (E, NS) and query (E, NQ, D), not {tuple(support.shape)}, '
                                f'{tuple(support_y.shape)} and {tuple(query.shape)}')
            check_settings_of(checked, settings)
            if support.dtype != query.dtype:
                support,query = (x.to(torch.promote_types(support.dtype, query.dtype)) for x in (support, query))
            logits = inner(support, support_y, query, **settings)
            if not torch.isfinite(logits.sum()): raise why_not_finite(name, support, support_y, query, logits)
            return logits
        checked.transductive,checked.balanced,checked.at_once = transductive,balanced,at_once
        CLASSIFIERS[name] = checked
        return checked
    return register

def why_not_finite(name, support, support_y, query, logits):
    if not (torch.isfinite(support).all() and torch.isfinite(query).all()):
        return UserError('the features hold NaN or infinite values: the network diverged, or images are damaged; classify others')
    n = F.one_hot(support_y, logits.shape[-1]).sum(1)
    if (n == 0).any():
        return UserError(f'class {int((n == 0).nonzero()[0][1])} has no support image: give each class of an episode at least one')
    return UserError(f'{name} gives logits that are not finite: its settings do not suit features of this size, try normalised ones')

def check_settings_of(classifier, settings):
    "Raise UserError for a setting that the classifier, given by name or as a function, does not have"
    f = get_classifier(classifier)
    known = inspect.signature(f).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()): return
    wrong = next((k for k in settings if k not in list(known)[3:]), None)
    for k,v in settings.items():
        default = known[k].default if k in known else None
        if isinstance(default, bool) and not isinstance(v, bool): raise UserError(f'{k} is {v!r}: it is True or False')
        number = isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < float('inf')
        if isinstance(default, int | float) and not isinstance(default, bool) and not number:
            raise UserError(f'{k} is {v!r}: it is a number, at least 0')
    name = classifier if isinstance(classifier, str) else getattr(f, '__name__', 'the classifier')
    if wrong:
        raise UserError(f'{name} has no setting {wrong!r}: ' +
                        (f'its settings are {", ".join(list(known)[3:])}' if len(known) > 3 else 'it has none'))

SCALE = 1e-9,1e15 # smallest and largest feature whose squared length float32 can hold

def check_scale(h):
    "Return the features unchanged; UserError if they are not finite, all zero, or too large or too small to compute with"
    low,high = h.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise UserError('the features hold NaN or infinite values: the network diverged, lower its learning rate')
    largest = max(-low.item(), high.item())
    if not SCALE[0] <= largest <= SCALE[1]:
        raise UserError(f'the largest feature is {largest:.3g}, so that lengths and distances cannot be computed: '
                        'rescale the features, or train the network')
    return h

def get_classifier(name):
    "The classifier of that name, or a UserError that lists them; a function is returned as it is"
    if callable(name): return name
    if not isinstance(name, str) or name not in CLASSIFIERS:
        raise UserError(f'unknown classifier {name!r}: it is one of {", ".join(CLASSIFIERS)}')
    return CLASSIFIERS[name]


def with_base_mean(names, base_features):
    "name -> classifier; `simpleshot_cl2n` centres by the mean of what `base_features()` gives (N, D), which is not asked for otherwise"
    of = {name:get_classifier(name) for name in names}
    if 'simpleshot_cl2n' in of: of['simpleshot_cl2n'] = partial(of['simpleshot_cl2n'], mean=base_features().mean(0))
    return of


# ---- what they share --------------------------------------------------------------------------------------------------

def one_hot(y, like): return F.one_hot(y).to(like.dtype)

def no_support(Y):
    "NaN (E, 1, C) for a class without support images, else 0"
    return torch.where(Y.amax(1, keepdim=True) > 0, 0., torch.nan)

def prototypes(support, support_y):
    "Mean feature of each class (E, C, D)"
    Y = one_hot(support_y, support)
    return (Y.mT @ support) / Y.sum(1).unsqueeze(-1)

def norms(x): return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)

def cosines(a, b):
    "(E, A, D), (E, B, D) -> (E, A, B); the longer one is read twice and not copied"
    return a @ (b / norms(b)).mT / norms(a)

def squared_distances(a, b):
    "(E, A, D), (E, B, D) -> (E, A, B)"
    return a.square().sum(-1, keepdim=True) + b.square().sum(-1).unsqueeze(-2) - 2 * a @ b.mT
