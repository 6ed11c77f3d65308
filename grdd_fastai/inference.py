"""Classifiers on features, `(support, support_y, query, ...) -> logits`: stateless, batched over episodes, by name in `CLASSIFIERS`

Shapes: E episodes, NS support and NQ query images, D features, C classes; support (E, NS, D), support_y 0..C-1 (E, NS), query
(E, NQ, D), logits (E, NQ, C), whose argmax is the prediction. Episodes do not see each other, and everything is in float32. Each raises
UserError for features that are not finite and for a class without support images. Inductive ones are here, the others, which look at
all queries of an episode together, in `transductive`.
"""
import inspect
import warnings
from functools import partial, wraps

import torch
import torch.nn.functional as F

from .errors import UserError
from .losses import full_precision

__all__ = ['CLASSIFIERS', 'register_classifier', 'get_classifier', 'check_settings_of', 'with_base_mean', 'prototypes', 'mean_cosine',
           'nearest_centroid', 'nearest_centroid_cosine', 'simpleshot_l2n', 'simpleshot_cl2n', 'nearest_neighbour', 'ridge',
           'logistic_regression']

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


# ---- inductive --------------------------------------------------------------------------------------------------------

@register_classifier('cosine')
def mean_cosine(support, support_y, query):
    """The paper's: sigma of Eq. 14, divided by the number of a class's support images

    With as many images of each class that changes no prediction; without, a sum would go to the class with the most images.
    """
    Y = one_hot(support_y, support)
    return query @ ((Y.mT @ (support / norms(support))) / Y.sum(1).unsqueeze(-1)).mT / norms(query)

@register_classifier('centroid')
def nearest_centroid(support, support_y, query):
    "Minus the squared distance to the mean feature of each class: Prototypical Networks' classifier (arXiv 1703.05175)"
    return -squared_distances(query, prototypes(support, support_y))

@register_classifier('centroid_cosine')
def nearest_centroid_cosine(support, support_y, query):
    "Cosine with the mean feature of each class"
    return cosines(query, prototypes(support, support_y))

@register_classifier('simpleshot_cl2n')
def simpleshot_cl2n(support, support_y, query,
    mean=None, # mean feature of the base classes (D), which has to be given
):
    "Nearest centroid of features centred by the base classes' mean and then normalised (SimpleShot's CL2N, arXiv 1911.04623)"
    if mean is None: raise UserError('simpleshot_cl2n needs the mean feature of the base classes: give mean=, or take simpleshot_l2n')
    mean = torch.as_tensor(mean, device=support.device)
    if mean.ndim and mean.shape[-1] != support.shape[-1]:
        raise UserError(f'the mean has {mean.shape[-1]} features and the images {support.shape[-1]}: take it of the same network')
    return simpleshot_l2n(support - mean, support_y, query - mean)

@register_classifier('simpleshot_l2n')
def simpleshot_l2n(support, support_y, query):
    "Nearest centroid of normalised features (SimpleShot's L2N, arXiv 1911.04623)"
    p = prototypes(F.normalize(support, dim=-1), support_y)
    return 2 * query @ p.mT / norms(query) - p.square().sum(-1).unsqueeze(1) - 1 # minus the squared distance to a query of length 1

@register_classifier('neighbour')
def nearest_neighbour(support, support_y, query):
    "Cosine with the nearest support image of each class"
    R = cosines(query, support)
    index,C = support_y.unsqueeze(1).expand_as(R),int(support_y.max())+1
    return R.new_full((*R.shape[:2], C), -torch.inf).scatter_reduce(2, index, R, 'amax')

@register_classifier('ridge')
def ridge(support, support_y, query,
    weight=1., # of the squared norm of the coefficients
    normalize=True, # features to unit length first
):
    "Ridge regression onto -1 and 1 with an intercept, in its dual form (R2-D2, arXiv 1805.08136; scikit-learn's RidgeClassifier)"
    if normalize: support,query = F.normalize(support, dim=-1),F.normalize(query, dim=-1)
    Y = 2*one_hot(support_y, support) - 1
    mean,offset = support.mean(1, keepdim=True),Y.mean(1, keepdim=True)
    X = support - mean
    K = X @ X.mT
    K.diagonal(dim1=1, dim2=2).add_(weight)
    return (query - mean) @ X.mT @ torch.linalg.solve(K, Y - offset) + offset + no_support(Y)

@register_classifier('logistic')
def logistic_regression(support, support_y, query,
    C=1., # weight of the losses' sum against half the squared norm of the coefficients, as in scikit-learn
    normalize=True, # features to unit length first, as RFS and SKD do
    tol=1e-6, # stop when no logit of a support image moves more
    max_iter=2000,
):
    """Multinomial logistic regression with an unpenalised intercept: RFS's classifier (arXiv 2003.11539), scikit-learn's LogisticRegression

    Minimises a quadratic upper bound of the loss again and again (Boehning, 1992), in its dual form, with Nesterov's momentum: a
    product with one (NS, NS) matrix a step, whatever D.
    """
    if normalize: support,query = F.normalize(support, dim=-1),F.normalize(query, dim=-1)
    Y,K,h = one_hot(support_y, support),support @ support.mT,C/2 # h bounds the curvature of C * cross-entropy in the logits
    M = h*K
    M.diagonal(dim1=1, dim2=2).add_(1.)
    M = torch.linalg.inv(M)
    u = M.sum(2, keepdim=True)
    M = M - u @ u.mT / u.sum(1, keepdim=True) # the intercept: columns of A sum to zero
    A = Z = Z_new = torch.zeros_like(Y)
    t,live = torch.ones(len(Y), 1, 1, device=Y.device),torch.ones(len(Y), 1, 1, dtype=torch.bool, device=Y.device)
    for _ in range(max_iter):
        G = C * (Z.softmax(-1) - Y)
        A = torch.where(live, M @ (h*Z - G), A)
        Z_old,Z_new = Z_new,torch.where(live, Z - (G + A)/h, Z_new)
        moved = Z_new - Z_old
        live = live & (moved.abs().amax((1, 2), keepdim=True) >= tol) # an episode rests when it is done, whatever the others do
        if not live.any(): break
        t = torch.where(((Z - Z_new)*moved).sum((1, 2), keepdim=True) > 0, 1., t) # momentum against the descent starts anew
        t_new = (1 + (1 + 4*t*t).sqrt()) / 2
        Z,t = Z_new + (t - 1)/t_new*moved,t_new
    if live.any():
        warnings.warn(f'logistic_regression has not converged in {max_iter} steps: normalise the features or lower C', stacklevel=2)
    b = (Z_new - K @ A).mean(1, keepdim=True)
    return query @ support.mT @ A + b + no_support(Y)
