"""Few-shot evaluation: embed a split once, then draw and classify as many episodes as wanted from the features."""
from dataclasses import dataclass

import numpy as np
import torch

from .errors import UserError
from .inference import sum_of_cosines

__all__ = ['Evaluation', 'features', 'embed', 'sample_episodes', 'evaluate', 'mean_ci95']

BLOCK = 500 # episodes drawn and classified at a time


def features(model, x):
    "h = phi(x) (Eq. 2), (B, D): a timm model's features before its classifier, any other module's output"
    if hasattr(model, 'forward_head'): return model.forward_head(model.forward_features(x), pre_logits=True)
    return model(x)


def amp(device, dtype): return torch.autocast(torch.device(device).type, dtype or torch.bfloat16, enabled=dtype is not None)


@torch.no_grad()
def embed(
    model, # timm model or module; left in the mode it was in
    dl, # DataLoader of (images, labels): `plain_dl(data, 'test')`
    dtype=None, # autocast to this, float32 if None
):
    "Features (N, D) in float32 and labels (N) of all images of `dl`, in order"
    was_training,device = model.training,next(model.parameters()).device
    model.eval()
    try:
        with amp(device, dtype): out = [(features(model, x.as_subclass(torch.Tensor).to(device)).float(), y) for x,y in dl]
    finally: model.train(was_training)
    h,y = (torch.cat([o.as_subclass(torch.Tensor) for o in part]) for part in zip(*out))
    return h,y.to(device)


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
    by_class,m = [np.flatnonzero(y==c) for c in np.unique(y)],k_shot + n_query
    size = np.array([len(rows) for rows in by_class])
    if n_way > len(size): raise UserError(f'{n_way}-way episodes need {n_way} classes, there are {len(size)}: lower the way')
    if size.min() < m: raise UserError(
        f'{k_shot} support + {n_query} query images a class are asked for, a class has only {size.min()}: lower --query or the shot')
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


def mean_ci95(x):
    "Mean and half-width of its 95% confidence interval, 1.96 standard errors"
    x = np.asarray(x, dtype=np.float64)
    return float(x.mean()),float(1.96 * x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float('nan')


@dataclass
class Evaluation:
    "Accuracy of each episode, in percent"
    episodes: np.ndarray
    @property
    def accuracy(self): return mean_ci95(self.episodes)[0]
    @property
    def ci95(self): return mean_ci95(self.episodes)[1]
    def __sub__(self, other): return Evaluation(self.episodes - other.episodes) # paired, on the same episodes
    def __repr__(self): return f'{self.accuracy:.2f} ± {self.ci95:.2f} % ({len(self.episodes)} episodes)'


@torch.no_grad()
def evaluate(
    h, # features (N, D)
    y, # classes (N)
    n_way=5, # C, classes an episode
    k_shot=1, # K, support images a class
    n_query=15, # query images a class
    n_episodes=10_000,
    seed=0, # of the episodes
    classifier=sum_of_cosines, # (support, support_y, query) -> logits
):
    "Accuracy over `n_episodes` seeded episodes drawn from features"
    if not torch.isfinite(h).all(): raise UserError('the features hold NaN or infinite values: the network diverged, lower its learning rate')
    accs,E = [],None
    for support,query in sample_episodes(y, n_way, k_shot, n_query, n_episodes, seed):
        E = len(support)
        s,q = (h[torch.as_tensor(rows.reshape(E, -1), device=h.device)] for rows in (support, query))
        s_y,q_y = (torch.arange(n_way, device=h.device).repeat_interleave(k).expand(E, -1) for k in (k_shot, n_query))
        accs.append((classifier(s, s_y, q).argmax(-1) == q_y).float().mean(1).cpu())
    return Evaluation(100 * torch.cat(accs).double().numpy())
