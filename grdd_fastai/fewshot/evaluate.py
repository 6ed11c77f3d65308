"""Few-shot accuracy from features: episodes are drawn and classified."""
import hashlib
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from ..core.device import ieee_float32
from ..core.distributed import all_gather, rank_world
from ..core.errors import UserError, first_line
from ..data.episodes import BLOCK, QUERY_SAMPLERS
from .classifiers import check_scale, get_classifier, without_settings
from .stats import Evaluation

__all__ = ['evaluate']


MAX_EPISODES = 10**8 # limit for one call of `evaluate`
CHUNK_BYTES = 2**21,2**28 # bytes of features that are classified at a time on a CPU (fits its cache) and on a GPU (keeps it busy)


def as_features(h):
    "Features (N, D), a tensor or an array, as a float32 or float64 tensor; UserError for other shapes and values that are no real numbers"
    try: h = h if isinstance(h, torch.Tensor) else torch.as_tensor(np.asarray(h))
    except (TypeError, ValueError, RuntimeError) as e:
        raise UserError(f'the features are no numbers ({first_line(e)}): give a tensor or an array (N, D)') from None
    if h.is_meta or h.layout != torch.strided: raise UserError('the features are a tensor without values or a sparse one: give a dense one')
    if h.is_complex(): raise UserError('the features are complex numbers: give real ones')
    if h.ndim < 2 or not h.numel(): raise UserError(f'the features have the shape {tuple(h.shape)}: give one row per image, (N, D)')
    return h if h.dtype in (torch.float32, torch.float64) else h.float()

def check_index(h, y):
    "UserError for a DataFrame of features and a Series of classes whose rows have other names, because they are taken in their order"
    if isinstance(h, pd.DataFrame) and isinstance(y, pd.Series) and len(h) == len(y) and not h.index.equals(y.index):
        raise UserError('the rows of the features and the classes have other names: put them into one order, or reset_index() both')

def as_classes(y, n):
    "Classes of `n` images, given as numbers or names, as an int64 tensor (n); UserError if one is missing or they are of several kinds"
    y = np.asarray(y.cpu() if isinstance(y, torch.Tensor) else y)
    if y.shape != (n,): raise UserError(f'{n} rows of features and classes of shape {y.shape}: give a class for each row')
    if y.dtype.kind == 'f' and np.isfinite(y).all() and (y == np.floor(y)).all(): y = y.astype(np.int64)
    if y.dtype.kind in 'iub': return torch.from_numpy(y.astype(np.int64))
    if any(is_missing(o) for o in y.tolist()): raise UserError('a class is missing (None or NaN): give each row one, or leave the row out')
    try: return torch.from_numpy(np.unique(y, return_inverse=True)[1].astype(np.int64))
    except TypeError: raise UserError('the classes are of several kinds, such as text and numbers: give all of them as text') from None

def is_missing(o):
    "Whether `o` is None, NaN or pandas' NA"
    return o is None or (missing := pd.isna(o)) is True or (isinstance(missing, np.bool_) and bool(missing))

def checked_logits(name, f, support, support_y, query, n_way):
    "The logits (E, NQ, C) of the classifier `f` for C = `n_way` classes; UserError if their type or shape is wrong or they are not finite"
    logits = f(support, support_y, query)
    shape = (*query.shape[:2], n_way)
    if not isinstance(logits, torch.Tensor) or logits.shape != shape:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UserError(f'{name} gives {found}: '
                        f'a classifier gives logits (E, NQ, C), here {shape}')
    if not logits.is_floating_point(): raise UserError(f'{name} gives {logits.dtype}: logits are floating-point numbers')
    if not torch.isfinite(logits.sum()): raise UserError(f'{name} gives logits that are NaN or infinite: they cannot be compared')
    return logits

def classified(h, episodes, classifiers, n_way, names, views=None, rank=0, world=1):
    """Yield (first, support, query, query_y, k, logits) for some episodes at a time and for each of the `classifiers` (k -> function)

    `first` is the number of the first of these E episodes, `support` (E, NS) and `query` (E, NQ) are rows of the features `h`, and
    `query_y` (E, NQ) are the classes in the episode. `episodes` is what a sampler of rows yields; the process `rank` of `world` classifies
    its part. With `views` (V, N, D) the support features are those of all views.
    """
    support_features,V = (h, 1) if views is None else (views.flatten(0, 1), len(views))
    functions = [without_settings(f) for f in classifiers.values()]
    budget = CHUNK_BYTES[h.device.type != 'cpu'] * max(getattr(f, 'chunk_multiplier', 1) for f in functions)
    for block,(support,query,query_y) in enumerate(episodes):
        if block % world != rank: continue
        k_shot,n_query = support.shape[2],query[0].size
        size = max(1, budget // max(1, (n_way*V*k_shot + n_query)*h[0].numel()*h.element_size()))
        for at in range(0, len(support), size):
            s,q,q_y = (torch.as_tensor(a[at:at+size], device=h.device).flatten(1) for a in (support, query, query_y))
            s_y = torch.arange(n_way, device=h.device).repeat_interleave(k_shot).repeat(V).expand(len(s), -1)
            several = torch.cat([s + v*len(h) for v in range(V)], 1)
            z_s,z_q = (b.index_select(0, rows.flatten()).view(*rows.shape, -1) for b,rows in ((support_features, several), (h, q)))
            for k,f in classifiers.items():
                with ieee_float32(): logits = checked_logits(names[k], f, z_s, s_y, z_q, n_way)
                yield block*BLOCK + at,s,q,q_y,k,logits

@torch.no_grad()
def evaluate(
    h:torch.Tensor|np.ndarray, # features (N, D), a tensor or an array
    y:torch.Tensor|np.ndarray|list, # classes (N), numbers or names
    n_way:int=5, # C, classes per episode
    k_shot:int=1, # K, support images per class
    n_query:int=15, # query images per class
    n_episodes:int=10_000, # number of episodes
    seed:int=0, # seed of the episodes
    # name in `CLASSIFIERS`, with settings as in 'tim_adm(scale=6)' or without; function `(support, support_y, query) -> logits`; list of
    # names; or dict name -> function
    classifier:str|Callable|list|dict='cosine',
    query_distribution:str='balanced', # 'balanced': n_query of each class; 'dirichlet': as many in total, unbalanced (`sample_unbalanced`)
    # features of augmented views (V, N, D) that replace h in the support: the support augmentation of RFS (arXiv 2003.11539)
    views:torch.Tensor|np.ndarray|None=None,
    distributed:bool=False, # in a distributed run, each process classifies a part of the episodes and all get the whole
) -> Evaluation|dict[str, Evaluation]:
    """The `Evaluation` over `n_episodes` seeded episodes drawn from features: accuracy of each episode in percent

    With several classifiers, the result is a dict name -> `Evaluation` on the same episodes. The difference `a - b` of two evaluations is a
    paired `Difference`. Memory for features does not grow with the number of episodes. UserError for unusable features or settings.
    """
    check_index(h, y)
    h = as_features(h)
    y = as_classes(y, len(h))
    if views is not None: views = as_features(views)
    if not isinstance(query_distribution, str) or query_distribution not in QUERY_SAMPLERS:
        known = ', '.join(QUERY_SAMPLERS)
        raise UserError(f'the query distribution is {query_distribution!r}: it is one of {known}')
    for x in (h, *(views if views is not None else ())): check_scale(x)
    if views is not None and views.shape[1:] != h.shape:
        raise UserError(f'views of shape {tuple(views.shape)} are not those of features {tuple(h.shape)}')
    for k,v in dict(n_way=n_way, k_shot=k_shot, n_query=n_query).items():
        if not isinstance(v, int | np.integer) or isinstance(v, bool): raise UserError(f'{k} is {v!r}: give a whole number')
    one = not isinstance(classifier, (dict, list, tuple))
    for c in [] if one or isinstance(classifier, dict) else classifier: get_classifier(c)
    classifiers = classifier if isinstance(classifier, dict) else {c:c for c in ([classifier] if one else classifier)}
    classifiers = {k:get_classifier(f) for k,f in classifiers.items()}
    if not classifiers: raise UserError('no classifier is given: name one, such as cosine')
    if not isinstance(n_episodes, int | np.integer) or isinstance(n_episodes, bool) or not 1 <= n_episodes <= MAX_EPISODES:
        raise UserError(f'{n_episodes!r} episodes are asked for: it must be at least 1 and at most {MAX_EPISODES}')
    # one array per classifier, because many small arrays would fragment the memory
    accs = {k:np.zeros(n_episodes) for k in classifiers}
    rank,n = rank_world() if distributed else (0, 1)
    names = {k:k if isinstance(k, str) else getattr(k, '__name__', str(k)) for k in classifiers}
    sampler = QUERY_SAMPLERS[query_distribution](y, n_way, k_shot, n_query, n_episodes, seed)
    for first,_,_,q_y,k,logits in classified(h, sampler, classifiers, n_way, names, views, rank, n):
        accs[k][first:first+len(q_y)] = 100 * (logits.argmax(-1) == q_y).float().mean(1).cpu().numpy()
    if n > 1: accs = {k:sum(all_gather([a])) for k,a in accs.items()} # each episode is zero in all processes but one
    classes = hashlib.sha256(y.numpy().tobytes()).hexdigest()[:8]
    episode_id = f'{n_episodes} of {n_way} way {k_shot} shot {n_query} query, seed {seed}, {len(y)} images {classes}'
    if query_distribution != 'balanced': episode_id += f', {query_distribution} queries'
    how = '' if views is None else f', support of {len(views)} views'
    made = {k:Evaluation(accs[k], episode_id, names[k] + how) for k in classifiers}
    return next(iter(made.values())) if one else made
