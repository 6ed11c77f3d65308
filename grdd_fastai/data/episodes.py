"""Samplers of episodes and their checks: a DataLoader of images for training, and rows of features for evaluation."""
from collections.abc import Iterator
from functools import cached_property

import matplotlib.pyplot as plt
import numpy as np
import torch

from ..core.errors import UserError
from .loaders import SeededDL

__all__ = ['check_episode', 'indices_by_class', 'EpisodicDL', 'sample_episodes', 'sample_unbalanced']


def check_episode(split, n_way, k_shot, n_query):
    "Raise UserError if `split` cannot fill an episode of `n_way` classes with `k_shot + n_query` images each"
    indices_by_class(split.y, n_way, k_shot, n_query, f'the {split.name} split', split.vocab)

def indices_by_class(y, n_way, k_shot, n_query, where='the data', vocab=None):
    "A list with the rows of each class of `y`; UserError if they cannot fill an episode"
    for name,v,lowest in (('way', n_way, 2), ('shot', k_shot, 1), ('query', n_query, 1)):
        if not isinstance(v, int | np.integer) or v < lowest:
            raise UserError(f'an episode of {v!r} {name}: it must be a whole number, at least {lowest}')
    classes = np.unique(y)
    rows = [np.flatnonzero(y==c) for c in classes]
    if n_way > len(rows):
        raise UserError(f'{where} has {len(rows)} classes, too few for {n_way}-way episodes: lower the way or add classes')
    least = min(range(len(rows)), key=lambda i: len(rows[i]))
    if len(rows[least]) < k_shot + n_query:
        name = vocab[least] if vocab else classes[least]
        raise UserError(f'class {name} of {where} has {len(rows[least])} images, too few for {k_shot} support + {n_query} '
                        'query images: lower --query (or the shot) or add images')
    return rows


class EpisodicDL(SeededDL):
    """DataLoader of `n_episodes` episodes per epoch: `n_way` classes, each with `k_shot` support and `n_query` query images

    A batch holds `episodes_per_step` episodes one after the other: (episodes_per_step * n_way * (k_shot + n_query), 3, H, W). An episode is
    sorted by class, and in each class the support images come before the query images. `EpisodicLoss.split` separates them. No image is
    both support and query. UserError for sizes that are out of range and for classes with too few images.
    """
    def __init__(self, dataset, n_way:int=5, k_shot:int=1, n_query:int=15, n_episodes:int=400, episodes_per_step:int=1, **kwargs):
        for k,v,most in (('n_episodes', n_episodes, 100_000), ('episodes_per_step', episodes_per_step, 10_000)):
            if not isinstance(v, int | np.integer) or not 1 <= v <= most: raise UserError(f'{k} is {v!r}: it must be from 1 to {most}')
        self.episode = dict(n_way=n_way, k_shot=k_shot, n_query=n_query, n_episodes=n_episodes, episodes_per_step=episodes_per_step)
        self.n_way,self.k_shot,self.n_query,self.n_episodes = n_way,k_shot,n_query,n_episodes
        self.n_item = k_shot + n_query # images per class
        for k in ('bs','shuffle','drop_last','n'): kwargs.pop(k, None) # the episodes determine these
        super().__init__(dataset, bs=episodes_per_step*n_way*self.n_item, **kwargs)

    def new(self, dataset=None, cls=None, **kwargs):
        return super().new(dataset, cls, **({**self.episode, **kwargs} if cls is None else kwargs))

    def for_rank(self, rank, world):
        "The loader of process `rank` of `world`: whole episodes, the same number for each process"
        return self.new(episodes_per_step=max(1, self.episode['episodes_per_step']//world), share=(rank, world))

    @cached_property
    def by_class(self):
        return indices_by_class(self.labels(), self.n_way, self.k_shot, self.n_query)

    def __len__(self):
        world = self.share[1]
        episodes_per_step = self.episode['episodes_per_step']
        return -(-self.n_episodes // episodes_per_step) if world == 1 else self.n_episodes // (world*episodes_per_step)
    def get_idxs(self):
        "Rows of all episodes of this epoch, drawn in the main process, so that they do not depend on the number of workers"
        rng = np.random.default_rng([self.seed, max(self.epoch, 0)])
        return self.rank_idxs(training_episodes(rng, self.by_class, self.n_way, self.n_item, self.n_episodes).ravel(), whole=True)

    def show_batch(self, b=None, max_n=None, ctxs=None, show=True, figsize=None, nrows=5, **kwargs):
        "Show the first episode, one class per row: framed support images, then query images; at most `nrows` rows of `max_n` images"
        if not show: return super().show_batch(b, show=False)
        x,y = self.decode(self.one_batch() if b is None else b)
        n = min(self.n_item, max_n or self.k_shot + 7)
        nrows = min(self.n_way, nrows)
        names = self.dataset.tls[-1].tfms
        _,axes = plt.subplots(nrows, n, figsize=figsize or (1.1*n, 1.2*nrows), squeeze=False)
        for i,row in enumerate(axes):
            for j,ax in enumerate(row):
                k = i*self.n_item + j
                support = j < self.k_shot
                x[k].show(ctx=ax)
                ax.set(xticks=[], yticks=[])
                ax.axis('on')
                for side in ax.spines.values(): side.set(color='C1' if support else '0.85', linewidth=3 if support else 1)
                if i==0 and j in (0, self.k_shot): ax.set_title('support' if support else 'query', loc='left', fontsize=10)
            row[0].set_ylabel(str(names.decode(y[i*self.n_item])), fontsize=9)


# ---- training episodes ------------------------------------------------------------------------------------------------

def floyd(n, m, draw):
    """Draw m different numbers from range(n) by Floyd's algorithm, for each element of the array `n`: (..., m)

    `draw(j, bound)` gives the j-th random number of each element, from range(bound). All sets have the same
    probability, but not all orders.
    """
    chosen = np.full((*n.shape, m), -1)
    for j in range(m):
        last = n - m + j
        pick = draw(j, last + 1)
        chosen[..., j] = np.where((chosen == pick[..., None]).any(-1), last, pick)
    return chosen

class Words:
    "Random words of 32 bits (..., n), and the numbers that numpy's `Generator` makes of them"
    def __init__(self, words):
        self.words = words.astype(np.uint64)
        self.refused = np.zeros(words.shape, bool) # True for a word that the generator would reject, to use the next word instead
    def below(self, j, bound):
        "Map the words in column `j` to numbers from range(bound) by Lemire's method (arXiv 1805.10941)"
        bound = np.asarray(bound, np.uint64)
        product = self.words[..., j] * bound
        self.refused[..., j] = product % 2**32 < 2**32 % bound
        return (product >> np.uint64(32)).astype(np.int64)
    def choice(self, n, m):
        "m different numbers from range(n) in random order, as `Generator.choice(n, m, replace=False)` gives them for 2m - 1 words"
        chosen = floyd(n, m, self.below)
        for i in range(m - 1, 0, -1):
            pick = self.below(2*m - 1 - i, i + 1)[..., None]
            last = chosen[..., i:i+1].copy()
            chosen[..., i:i+1] = np.take_along_axis(chosen, pick, -1)
            np.put_along_axis(chosen, pick, last, -1)
        return chosen

def training_episodes(rng, by_class, n_way, n_item, n_episodes):
    """Rows (n_episodes, n_way, n_item) of episodes, drawn from the rows of each class: first the classes, then the images of each class

    These are the numbers that nested calls of `Generator.choice` give, in a tenth of their time.
    """
    size = np.array([len(rows) for rows in by_class])
    n_classes = len(by_class)
    if n_way == n_classes or size.min() == n_item or max(*size, n_classes) > 10_000: # the generator uses fewer words or another algorithm
        return np.array([[rng.choice(by_class[c], n_item, replace=False) for c in rng.choice(n_classes, n_way, replace=False)]
                         for _ in range(n_episodes)])
    table = np.stack([np.pad(rows, (0, size.max() - len(rows))) for rows in by_class])
    k,m = 2*n_way - 1,2*n_item - 1 # words for the classes of an episode, and for the images of a class
    total = n_episodes*(k + n_way*m)
    stream = rng.bit_generator.random_raw(total//2 + total//10_000 + 50).astype('<u8').view('<u4') # its low half comes first
    while True:
        words = stream[:total].reshape(n_episodes, -1)
        of_classes,of_images = Words(words[:, :k]),Words(words[:, k:].reshape(n_episodes, n_way, m))
        classes = of_classes.choice(np.full(n_episodes, n_classes), n_way)
        chosen = of_images.choice(size[classes], n_item)
        refused = np.concatenate([of_classes.refused, of_images.refused.reshape(n_episodes, -1)], 1)
        if not refused.any(): return table[classes[..., None], chosen]
        stream = np.delete(stream, refused.argmax()) # one word in millions


# ---- episodes of features ---------------------------------------------------------------------------------------------

BLOCK = 500 # episodes drawn at a time


def sample_episodes(
    y:torch.Tensor|np.ndarray, # class of each image (N)
    n_way:int=5, # C, classes per episode
    k_shot:int=1, # K, support images per class
    n_query:int=15, # query images per class
    n_episodes:int=10_000, # number of episodes
    seed:int=0, # seed of the episodes; a larger `n_episodes` adds episodes after the same first ones
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    "Yield blocks of episodes: disjoint rows of the support (E, C, K) and query images (E, C, n_query); UserError if `y` cannot fill them"
    y = np.asarray(y.cpu() if isinstance(y, torch.Tensor) else y)
    by_class = indices_by_class(y, n_way, k_shot, n_query)
    m = k_shot + n_query
    if not isinstance(n_episodes, int | np.integer) or n_episodes < 1:
        raise UserError(f'{n_episodes!r} episodes are asked for: it must be at least 1')
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise UserError(f'the seed of the episodes is {seed!r}: give a whole number, 0 or more')
    size = np.array([len(rows) for rows in by_class])
    table = np.stack([np.pad(rows, (0, size.max() - len(rows))) for rows in by_class])
    for block in range(-(-n_episodes // BLOCK)):
        rng = np.random.default_rng([seed, block])
        classes = rng.random((BLOCK, len(size))).argsort(1)[:, :n_way] # (E, C)
        n = size[classes]
        chosen = floyd(n, m, lambda j, bound: (rng.random(n.shape) * bound).astype(np.int64))  # noqa: B023
        chosen = np.take_along_axis(chosen, rng.random(chosen.shape).argsort(-1), -1) # all orders have the same probability
        rows = table[classes[..., None], chosen][:n_episodes - block*BLOCK]
        yield rows[..., :k_shot],rows[..., k_shot:]


def sample_unbalanced(
    y, n_way=5, k_shot=1, n_query=15, n_episodes=10_000, seed=0, # same as in `sample_episodes`
    concentration=2., # parameter of the symmetric Dirichlet distribution of the classes' shares of the queries
):
    """Yield blocks of episodes with unbalanced queries, as in alpha-TIM (arXiv 2204.11181)

    A block is the support rows (E, C, K), the query rows (E, C * n_query) and the classes 0..C-1 of the queries (E, C * n_query). Each
    episode has n_way * n_query queries. The shares of the classes are drawn from Dirichlet(`concentration`) and rounded by the largest
    remainders. UserError if `y` cannot fill the episodes.
    """
    total = n_way*n_query
    # one class may get all queries, so `total` are drawn for each
    for block,(support,query) in enumerate(sample_episodes(y, n_way, k_shot, total, n_episodes, seed)):
        rng = np.random.default_rng([seed, block, 1])
        shares = rng.dirichlet([concentration]*n_way, BLOCK)[:len(query)] * total
        counts = np.floor(shares).astype(np.int64)
        rank = (shares - counts).argsort(1)[:, ::-1].argsort(1)
        counts += rank < (total - counts.sum(1))[:, None]
        taken = np.arange(total) < counts[..., None] # (E, C, total)
        query_y = np.broadcast_to(np.arange(n_way)[:, None], taken.shape)[taken]
        yield support,query[taken].reshape(-1, total),query_y.reshape(-1, total)

def _balanced(*args):
    "`sample_episodes` with the classes 0..C-1 of the queries (E, C, n_query) as a third array"
    for support,query in sample_episodes(*args):
        yield support,query,np.broadcast_to(np.arange(query.shape[1])[:, None], query.shape).copy()

QUERY_SAMPLERS = dict(balanced=_balanced, dirichlet=sample_unbalanced)
