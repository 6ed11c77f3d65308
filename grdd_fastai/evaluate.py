"""Few-shot evaluation: embed a split once, then draw and classify as many episodes as wanted from the features."""
import hashlib
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.stats import ttest_1samp

from . import transductive  # noqa: F401  (registers its classifiers)
from .data import rows_by_class
from .distributed import gathered, ranks, summed
from .errors import UserError, first_line
from .inference import check_scale, get_classifier
from .precision import amp

__all__ = ['Evaluation', 'Difference', 'over_seeds', 'compare', 'features', 'embed', 'sample_episodes', 'sample_unbalanced', 'evaluate',
           'mean_ci95']

MOST_EPISODES = 10**8 # that are evaluated at once
BLOCK = 500 # episodes drawn at a time
CHUNK = 2**21,2**28 # bytes of features classified at a time: what a CPU's cache holds, what fills a GPU


def features(model, x):
    "h = phi(x) (Eq. 2), (B, D): a timm model's features before its classifier, any other module's output"
    if hasattr(model, 'forward_head'): return model.forward_head(model.forward_features(x), pre_logits=True)
    return model(x)


@torch.no_grad()
def embed(
    model, # timm model or module; left in the mode it was in
    dl, # DataLoader of (images, labels): `plain_dl(data, 'test')`
    dtype=None, # autocast to this, float32 if None
    out=None, # array (N, D) that takes the features, memory-mapped for instance; None makes a tensor on the model's device
    shared=False, # the processes of a distributed run each embed a part, all have all
):
    "Features (N, D) in float32 and labels (N) of all images of `dl`, in order"
    was_training,device = model.training,next(model.parameters()).device
    model.eval()
    h,y,N,(rank,n) = None if out is None else torch.from_numpy(out),None,len(dl.dataset),ranks() if shared else (0, 1)
    if n > 1: dl = dl.new(share=(rank, n), bs=min(dl.bs, -(-N//n))) # something for each
    at = rank*dl.bs if n > 1 else 0
    try:
        with amp(device, dtype):
            for x,y_b in dl:
                h_b = features(model, x.as_subclass(torch.Tensor).to(device))
                if h is None: h = torch.zeros(N, *h_b.shape[1:], device=device) # once, never copied
                if y is None: y = torch.zeros(N, dtype=torch.int64)
                h[at:at+len(h_b)],y[at:at+len(h_b)] = h_b,y_b.as_subclass(torch.Tensor)
                at += len(h_b) + (n-1)*dl.bs if n > 1 else len(h_b)
    finally: model.train(was_training)
    return (summed(h),summed(y.to(device))) if n > 1 else (h,y.to(device))


def sample_episodes(
    y, # class of each image (N)
    n_way=5, # C, classes an episode
    k_shot=1, # K, support images a class
    n_query=15, # query images a class
    n_episodes=10_000,
    seed=0, # the same seed draws the same episodes; more episodes begin with the fewer
):
    "Yield blocks of episodes: rows of the support (E, C, K) and of the query images (E, C, n_query), disjoint"
    y = np.asarray(y.cpu() if isinstance(y, torch.Tensor) else y)
    by_class,m = rows_by_class(y, n_way, k_shot, n_query),k_shot + n_query
    if not isinstance(n_episodes, int | np.integer) or n_episodes < 1:
        raise UserError(f'{n_episodes!r} episodes are asked for: it must be at least 1')
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise UserError(f'the seed of the episodes is {seed!r}: give a whole number, 0 or more')
    size = np.array([len(rows) for rows in by_class])
    table = np.stack([np.pad(rows, (0, size.max() - len(rows))) for rows in by_class])
    for block in range(-(-n_episodes // BLOCK)):
        rng = np.random.default_rng([seed, block])
        classes = rng.random((BLOCK, len(size))).argsort(1)[:, :n_way]                    # (E, C)
        n,chosen = size[classes],np.full((BLOCK, n_way, m), -1)
        for j in range(m): # Floyd's algorithm: m of n without replacement, every set equally likely
            last = n - m + j
            pick = (rng.random(n.shape) * (last + 1)).astype(np.int64)
            chosen[..., j] = np.where((chosen == pick[..., None]).any(-1), last, pick)
        chosen = np.take_along_axis(chosen, rng.random(chosen.shape).argsort(-1), -1)     # and every order
        rows = table[classes[..., None], chosen][:n_episodes - block*BLOCK]
        yield rows[..., :k_shot],rows[..., k_shot:]


def sample_unbalanced(
    y, n_way=5, k_shot=1, n_query=15, n_episodes=10_000, seed=0, # as in `sample_episodes`
    concentration=2., # of the symmetric Dirichlet distribution the classes' shares of the queries are drawn from
):
    """Yield blocks of episodes whose n_way * n_query queries fall unevenly on the classes: support rows (E, C, K), query rows and their
    classes 0..C-1 (E, C * n_query)

    As alpha-TIM's (arXiv 2204.11181): shares from Dirichlet(2), rounded by the largest remainders.
    """
    total = n_way*n_query
    # as many of each class as one might need
    for block,(support,query) in enumerate(sample_episodes(y, n_way, k_shot, total, n_episodes, seed)):
        rng = np.random.default_rng([seed, block, 1])
        shares = rng.dirichlet([concentration]*n_way, BLOCK)[:len(query)] * total
        counts = np.floor(shares).astype(np.int64)
        rank = (shares - counts).argsort(1)[:, ::-1].argsort(1)
        counts += rank < (total - counts.sum(1))[:, None]
        taken = np.arange(total) < counts[..., None]                                          # (E, C, total)
        yield support,query[taken].reshape(-1, total),np.broadcast_to(np.arange(n_way)[:, None], taken.shape)[taken].reshape(-1, total)


def mean_ci95(x):
    "Mean and half-width of its 95% confidence interval, 1.96 standard errors"
    x = np.asarray(x, dtype=np.float64)
    return float(x.mean()),float(1.96 * x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float('nan')


@dataclass
class Evaluation:
    "Accuracy of each episode, in percent"
    episodes: np.ndarray
    drawn: str = None # names the episodes: two evaluations can be compared where it is the same
    classifier: str = 'cosine' # and what else was chosen
    @property
    def accuracy(self): return mean_ci95(self.episodes)[0]
    @property
    def ci95(self): return mean_ci95(self.episodes)[1]
    def __sub__(self, other):
        "`Difference`, paired: both on the very same episodes (of images with the same labels), or a UserError"
        if self.drawn != other.drawn or len(self.episodes) != len(other.episodes): raise UserError(
            f'a difference needs the same episodes, not {self.drawn} and {other.drawn}: evaluate both with the same data, way, shot, '
            'query, episodes and seed')
        return Difference(self.episodes - other.episodes)
    def __repr__(self): return f'{self.accuracy:.2f} ± {self.ci95:.2f} % ({len(self.episodes)} episodes)'


@dataclass
class Difference:
    """Difference of two models' accuracies in each episode, in points

    Interval and p-value are over episodes drawn from these classes and images, for these weights: other trainings of the same
    two models may differ by more, which `over_seeds` tells.
    """
    episodes: np.ndarray
    @property
    def mean(self): return mean_ci95(self.episodes)[0]
    @property
    def ci95(self): return mean_ci95(self.episodes)[1]
    @property
    def p(self):
        "Two-sided p-value of the paired t-test; 1 if no episode differs"
        if not self.episodes.any(): return 1.
        return float(ttest_1samp(self.episodes, 0.).pvalue) if len(self.episodes) > 1 else float('nan')
    @property
    def clear(self):
        "1 or -1 where the interval lies above or below zero, else 0"
        return int(np.sign(self.mean)) if abs(self.mean) > self.ci95 else 0
    def __repr__(self): return f'{self.mean:+.2f} ± {self.ci95:.2f} points (p = {self.p:.2g}, {len(self.episodes)} episodes)'


def over_seeds(
    differences, # a `Difference` for each training seed
):
    "Mean of the differences, their standard deviation over seeds, and `holds`: 1 or -1 if every seed's is clear and of that sign, else 0"
    means,clear = [d.mean for d in differences],{d.clear for d in differences}
    sd = float(np.std(means, ddof=1)) if len(means) > 1 else float('nan')
    return dict(mean=float(np.mean(means)), sd=sd, seeds=len(means), holds=clear.pop() if len(clear) == 1 else 0)


def compare(
    scores, # name -> `Evaluation`, or {training seed: `Evaluation`}, all on the same episodes
    versus=None, # name -> names it is compared with; None compares each with all before it
):
    """Paired differences as a DataFrame: a line per pair and seed and, over several seeds, one of seed 'all'

    `difference` in points, its `ci95`, `p` (paired t-test) and `clear`: 1 or -1 where the interval excludes zero. Over seeds the
    mean, the standard deviation `sd`, and `clear` only if the order holds in every seed.
    """
    scores = {k:v if isinstance(v, dict) else {0:v} for k,v in scores.items()}
    if versus is None: versus = {k:list(scores)[:i] for i,k in enumerate(scores)}
    lines = []
    for row,others in versus.items():
        for other in others:
            found = {seed:e - scores[other][seed] for seed,e in scores.get(row, {}).items() if seed in scores.get(other, {})}
            lines += [dict(row=row, versus=other, seed=seed, difference=d.mean, ci95=d.ci95, p=d.p, clear=d.clear)
                      for seed,d in found.items()]
            if len(found) < 2: continue
            over = over_seeds(list(found.values()))
            lines.append(dict(row=row, versus=other, seed='all', difference=over['mean'], sd=over['sd'], clear=over['holds']))
    return pd.DataFrame(lines, columns=['row','versus','seed','difference','ci95','p','sd','clear'])


def as_features(h):
    "Features (N, D) of any kind, NumPy's and whole numbers too, as a floating-point tensor; half precision becomes float32"
    try: h = h if isinstance(h, torch.Tensor) else torch.as_tensor(np.asarray(h))
    except (TypeError, ValueError, RuntimeError) as e:
        raise UserError(f'the features are no numbers ({first_line(e)}): give a tensor or an array (N, D)') from None
    if h.is_meta or h.layout != torch.strided: raise UserError('the features are a tensor without values or a sparse one: give a dense one')
    if h.is_complex(): raise UserError('the features are complex numbers: give real ones')
    if h.ndim < 2 or not h.numel(): raise UserError(f'the features have the shape {tuple(h.shape)}: give a row an image, (N, D)')
    return h if h.dtype in (torch.float32, torch.float64) else h.float()

def as_classes(y, n):
    "Classes of `n` images, numbers or names, as a tensor of whole numbers"
    y = np.asarray(y.cpu() if isinstance(y, torch.Tensor) else y)
    if y.shape != (n,): raise UserError(f'{n} rows of features and classes of shape {y.shape}: give a class for each row')
    if y.dtype.kind == 'f' and np.isfinite(y).all() and (y == np.floor(y)).all(): y = y.astype(np.int64)
    if y.dtype.kind in 'iub': return torch.from_numpy(y.astype(np.int64))
    if any(is_missing(o) for o in y.tolist()): raise UserError('a class is missing (None or NaN): give each row one, or leave the row out')
    try: return torch.from_numpy(np.unique(y, return_inverse=True)[1].astype(np.int64))
    except TypeError: raise UserError('the classes are of several kinds, such as text and numbers: give all of them as text') from None

def is_missing(o):
    "None, NaN and pandas' NA"
    return o is None or (missing := pd.isna(o)) is True or (isinstance(missing, np.bool_) and bool(missing))

def checked_logits(name, f, support, support_y, query):
    "The logits of the classifier `f` (E, NQ, C); UserError unless they are finite and of the shape they should have"
    logits,shape = f(support, support_y, query),(*query.shape[:2], int(support_y.max()) + 1)
    if not isinstance(logits, torch.Tensor) or logits.shape != shape:
        raise UserError(f'{name} gives {tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__}: '
                        f'a classifier gives logits (E, NQ, C), here {shape}')
    if not logits.is_floating_point(): raise UserError(f'{name} gives {logits.dtype}: logits are floating-point numbers')
    if not torch.isfinite(logits.sum()): raise UserError(f'{name} gives logits that are NaN or infinite: they cannot be compared')
    return logits

@torch.no_grad()
def evaluate(
    h, # features (N, D), a tensor or an array
    y, # classes (N), numbers or names
    n_way=5, # C, classes an episode
    k_shot=1, # K, support images a class
    n_query=15, # query images a class
    n_episodes=10_000,
    seed=0, # of the episodes
    classifier='cosine', # a name of `CLASSIFIERS`, or `(support, support_y, query) -> logits`; or a list of names or dict of functions
    query_distribution='balanced', # n_query of each class, or 'dirichlet': as many in all, unevenly (`sample_unbalanced`)
    views=None, # features of V augmented views of every image (V, N, D), to be the support in place of h: RFS's support augmentation
    shared=False, # the processes of a distributed run each classify a part of the episodes, all have all
):
    """Accuracy over `n_episodes` seeded episodes drawn from features; `a - b` is the paired `Difference` of two

    Of several classifiers a dict of `Evaluation`s, all on the same episodes in one pass. Memory does not grow with the episodes.
    """
    h = as_features(h)
    y = as_classes(y, len(h))
    if views is not None: views = as_features(views)
    if not isinstance(query_distribution, str) or query_distribution not in QUERIES:
        raise UserError(f'the query distribution is {query_distribution!r}: it is one of {", ".join(QUERIES)}')
    for x in (h, *(views if views is not None else ())): check_scale(x)
    if views is not None and views.shape[1:] != h.shape:
        raise UserError(f'views of shape {tuple(views.shape)} are not those of features {tuple(h.shape)}')
    for k,v in dict(n_way=n_way, k_shot=k_shot, n_query=n_query).items():
        if not isinstance(v, int | np.integer) or isinstance(v, bool): raise UserError(f'{k} is {v!r}: give a whole number')
    one = not isinstance(classifier, (dict, list, tuple))
    for c in [] if one or isinstance(classifier, dict) else classifier: get_classifier(c)
    of = classifier if isinstance(classifier, dict) else {c:c for c in ([classifier] if one else classifier)}
    of = {k:get_classifier(f) for k,f in of.items()}
    if not of: raise UserError('no classifier is given: name one, such as cosine')
    if not isinstance(n_episodes, int | np.integer) or isinstance(n_episodes, bool) or not 1 <= n_episodes <= MOST_EPISODES:
        raise UserError(f'{n_episodes!r} episodes are asked for: it must be at least 1 and at most {MOST_EPISODES}')
    bank,V = (h, 1) if views is None else (views.flatten(0, 1), len(views))
    budget = CHUNK[h.device.type != 'cpu'] * max(getattr(getattr(f, 'func', f), 'at_once', 1) for f in of.values()) # a partial's, too
    size = max(1, budget // max(1, n_way*(V*k_shot + n_query)*h[0].numel()*h.element_size()))
    # one array per classifier, since many small arrays would fragment the memory
    accs,(rank,n) = {k:np.zeros(n_episodes) for k in of},ranks() if shared else (0, 1)
    names = {k:k if isinstance(k, str) else getattr(k, '__name__', str(k)) for k in of}
    for block,(support,query,query_y) in enumerate(QUERIES[query_distribution](y, n_way, k_shot, n_query, n_episodes, seed)):
        if block % n != rank: continue
        for at in range(0, len(support), size):
            s,q,q_y = (torch.as_tensor(a[at:at+size], device=h.device).flatten(1) for a in (support, query, query_y))
            s_y = torch.arange(n_way, device=h.device).repeat_interleave(k_shot).repeat(V).expand(len(s), -1)
            s = torch.cat([s + v*len(y) for v in range(V)], 1)
            z_s,z_q = (b.index_select(0, rows.flatten()).view(*rows.shape, -1) for b,rows in ((bank, s), (h, q)))
            first = block*BLOCK + at
            for k,f in of.items():
                accs[k][first:first+len(s)] = 100 * (
                    checked_logits(names[k], f, z_s, s_y, z_q).argmax(-1) == q_y).float().mean(1).cpu().numpy()
    if n > 1: accs = {k:sum(gathered([a])) for k,a in accs.items()} # an episode is zero in all processes but one
    classes = hashlib.sha256(y.numpy().tobytes()).hexdigest()[:8]
    drawn = f'{n_episodes} of {n_way} way {k_shot} shot {n_query} query, seed {seed}, {len(y)} images {classes}'
    if query_distribution != 'balanced': drawn += f', {query_distribution} queries'
    how = '' if V == 1 else f', support of {V} views'
    made = {k:Evaluation(accs[k], drawn, names[k] + how) for k in of}
    return next(iter(made.values())) if one else made

def _balanced(*args):
    for support,query in sample_episodes(*args):
        yield support,query,np.broadcast_to(np.arange(query.shape[1])[:, None], query.shape).copy()

QUERIES = dict(balanced=_balanced, dirichlet=sample_unbalanced)
