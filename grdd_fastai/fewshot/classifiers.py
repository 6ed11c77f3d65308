"""Registry of few-shot classifiers by name, with its checks and shared functions

A classifier is a stateless function `(support, support_y, query, ...) -> logits` on a batch of episodes. Shapes: E episodes, NS support
and NQ query images, D features, C classes; support (E, NS, D), support_y 0..C-1 (E, NS), query (E, NQ, D), logits (E, NQ, C). The
prediction is the argmax of the logits. Episodes do not influence each other. Half precision is computed in float32. A registered
classifier raises UserError for features that are not finite and for a class without support images.
"""
import ast
import inspect
import re
from collections.abc import Callable
from functools import partial, wraps

import torch
import torch.nn.functional as F

from ..core.errors import UserError
from ..core.own_file import module_of
from ..losses import full_precision

__all__ = ['CLASSIFIERS', 'register_classifier', 'check_classifier_settings', 'get_classifier', 'without_settings', 'split_names',
           'with_base_mean', 'prototypes']


CLASSIFIERS = {} # name -> function with the attributes `transductive`, `balanced` and `chunk_multiplier` (see `register_classifier`)


def register_classifier(
    name:str, # name in `CLASSIFIERS`
    transductive:bool=False, # whether the classifier uses all queries of an episode together
    balanced:bool=False, # whether the classifier assumes the same number of queries in each class
    chunk_multiplier:int=1, # chunk-size multiplier: iterative methods run faster on larger chunks
) -> Callable:
    "Decorator that registers a classifier: arguments are checked and half precision becomes float32; UserError if a logit is not finite"
    def register(f):
        inner = full_precision(f)
        @wraps(f)
        def checked(support, support_y, query, **settings):
            if (support.ndim != 3 or query.ndim != 3 or support_y.shape != support.shape[:2] or len(query) != len(support)
                or query.shape[2] != support.shape[2]):
                raise UserError(f'{name} takes support (E, NS, D), support_y (E, NS) and query (E, NQ, D), not {tuple(support.shape)}, '
                                f'{tuple(support_y.shape)} and {tuple(query.shape)}')
            check_classifier_settings(checked, settings)
            if support.dtype != query.dtype:
                support,query = (x.to(torch.promote_types(support.dtype, query.dtype)) for x in (support, query))
            logits = inner(support, support_y, query, **settings)
            if not torch.isfinite(logits.sum()): raise why_not_finite(name, support, support_y, query, logits)
            return logits
        checked.transductive,checked.balanced,checked.chunk_multiplier = transductive,balanced,chunk_multiplier
        CLASSIFIERS[name] = checked
        return checked
    return register

def why_not_finite(name, support, support_y, query, logits):
    "A UserError with the cause of logits that are not finite"
    if not (torch.isfinite(support).all() and torch.isfinite(query).all()):
        return UserError('the features hold NaN or infinite values: the network diverged, or images are damaged; classify others')
    n = F.one_hot(support_y, logits.shape[-1]).sum(1)
    if (n == 0).any():
        return UserError(f'class {int((n == 0).nonzero()[0][1])} has no support image: give each class of an episode at least one')
    return UserError(f'{name} gives logits that are not finite: its settings do not suit features of this size, try normalised ones')

def check_classifier_settings(classifier, settings):
    "Raise UserError for a setting that the classifier (a name or a function) does not have, and for a value of the wrong type"
    f = get_classifier(classifier)
    known = inspect.signature(f).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()): return
    names = list(known)[3:] # the first three parameters are support, support_y and query
    wrong = next((k for k in settings if k not in names), None)
    for k,v in settings.items():
        default = known[k].default if k in known else None
        if isinstance(default, bool) and not isinstance(v, bool): raise UserError(f'{k} is {v!r}: it is True or False')
        number = isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < float('inf')
        if isinstance(default, int | float) and not isinstance(default, bool) and not number:
            raise UserError(f'{k} is {v!r}: it is a number, at least 0')
    name = classifier if isinstance(classifier, str) else getattr(f, '__name__', 'the classifier')
    if wrong:
        has = 'its settings are ' + ', '.join(names) if names else 'it has none'
        raise UserError(f'{name} has no setting {wrong!r}: {has}')

FEATURE_RANGE = 1e-9,1e15 # smallest and largest feature value at which float32 can hold squared lengths

def check_scale(h):
    "Return the features `h` unchanged; UserError if they are not finite, all zero, or too large or too small to compute with"
    low,high = h.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise UserError('the features hold NaN or infinite values: the network diverged, lower its learning rate')
    largest = max(-low.item(), high.item())
    if not FEATURE_RANGE[0] <= largest <= FEATURE_RANGE[1]:
        raise UserError(f'the largest feature is {largest:.3g}, so that lengths and distances cannot be computed: '
                        'rescale the features, or train the network')
    return h

FORMER_NAMES = dict(centroid='prototype', centroid_cosine='prototype_cosine', neighbour='nearest_neighbour') # of version 0.1

def get_classifier(name:str|Callable) -> Callable:
    """The classifier with this name, which may have settings in parentheses: 'tim_adm' or 'tim_adm(scale=6, steps=100)'

    A function is returned unchanged. UserError with the list of names for an unknown name, and for settings that it does not have.
    """
    if callable(name): return name
    base,settings = split_settings(name) if isinstance(name, str) else (name, {})
    if not isinstance(base, str) or base not in CLASSIFIERS:
        known = ', '.join(CLASSIFIERS)
        raise UserError(f'unknown classifier {base!r}: it is one of {known}')
    if not settings: return CLASSIFIERS[base]
    check_classifier_settings(base, settings)
    return partial(CLASSIFIERS[base], **settings)

def split_settings(text):
    "(name, dict of settings) of a text such as 'tim_adm(scale=6, steps=100)'; UserError for a text of another form"
    try:
        call = ast.parse(text.strip(), mode='eval').body
        if isinstance(call, ast.Name): name,settings = call.id,{}
        else:
            name,settings = call.func.id,{k.arg:ast.literal_eval(k.value) for k in call.keywords}
            if call.args or None in settings or len(settings) < len(call.keywords): raise ValueError('not one value for each name')
    except (AttributeError, ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        if text.strip().replace('-', '_').isidentifier(): return text.strip(),{} # a name that no classifier has
        raise UserError(f"the classifier {text!r} is not understood: write its settings as in 'tim_adm(scale=6, steps=100)'") from None
    return FORMER_NAMES.get(name, name),settings

def without_settings(classifier):
    "The function of a classifier without the settings that its name, or a `partial`, fixes"
    return getattr(classifier, 'func', classifier)


def split_names(classifiers):
    """The names of classifiers, with their settings, in a text separated by commas; 'all' stands for every one

    A function of one's own is given by its file, as in 'my_file.py:my_function', and is then registered under its name. UserError for an
    unknown name, and for a file that cannot be used.
    """
    if not isinstance(classifiers, str): raise UserError(f'--classifiers is {classifiers!r}: give names separated by commas')
    names = list(CLASSIFIERS) if classifiers == 'all' else [name.strip() for name in re.split(r',(?![^(]*\))', classifiers)]
    names = [from_file(name) for name in names]
    for name in names: get_classifier(name)
    return names


def from_file(name):
    "Register the function that a text such as 'my_file.py:my_function(scale=2)' names, and return its name with the settings"
    found = re.fullmatch(r'(.+\.py):([A-Za-z_]\w*)(\(.*\))?', name)
    if not found: return name
    file,function,settings = found.groups()
    before = dict(CLASSIFIERS)
    try: f = getattr(module_of(file), function, None)
    except UserError: # the file may have registered some
        CLASSIFIERS.clear()
        CLASSIFIERS.update(before)
        raise
    if not callable(f): raise UserError(f'{file} has no function {function!r}: give one that takes (support, support_y, query)')
    if CLASSIFIERS.get(function) is not f and getattr(CLASSIFIERS.get(function), '__wrapped__', None) is not f:
        if function in CLASSIFIERS: raise UserError(f'there is a classifier {function!r} already: give the function in {file} another name')
        register_classifier(function)(f)
    return function + (settings or '')

def with_base_mean(names, base_features):
    """A dict name -> classifier, in which `simpleshot_cl2n` has the mean of the base features

    `base_features()` returns features (N, D); it is called only if `simpleshot_cl2n` is among `names`.
    """
    classifiers = {name:get_classifier(name) for name in names}
    for name,f in classifiers.items():
        if without_settings(f) is CLASSIFIERS['simpleshot_cl2n']: classifiers[name] = partial(f, mean=base_features().mean(0))
    return classifiers


# ---- shared functions -------------------------------------------------------------------------------------------------

def n_classes(support_y):
    "Number of classes C of the support labels 0..C-1; this waits for a GPU, because it reads a number from it"
    return int(support_y.max()) + 1

def one_hot(y, like): return F.one_hot(y, n_classes(y)).to(like.dtype)

def nan_without_support(Y):
    "(E, 1, C): NaN for a class without support images, else 0; `Y` is larger than 0 where an image (E, NS, C) is in a class"
    return torch.where(Y.amax(1, keepdim=True) > 0, 0., torch.nan)

def prototypes(support, support_y):
    "Mean support feature of each class (E, C, D)"
    Y = one_hot(support_y, support)
    return (Y.mT @ support) / Y.sum(1).unsqueeze(-1)

def norms(x): return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)

def cosines(a, b):
    "(E, A, D), (E, B, D) -> cosines (E, A, B); `a` may be long, because no normalised copy of it is made"
    return a @ (b / norms(b)).mT / norms(a)

def squared_distances(a, b):
    "(E, A, D), (E, B, D) -> squared distances (E, A, B)"
    return a.square().sum(-1, keepdim=True) + b.square().sum(-1).unsqueeze(-2) - 2 * a @ b.mT
