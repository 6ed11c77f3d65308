"""What Figures 3 and 5 of arXiv 2107.05583 show: t-SNE of the features of some classes, and the relatedness of an episode over T."""
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE

from ..data.cache import Split
from ..data.episodes import sample_episodes
from ..losses import log_relatedness, relatedness

__all__ = ['tsne_points', 'episode_rows', 'episode_relatedness']


TEMPERATURES = (0.05, 0.1, 0.5, 1., 4.)


def tsne_points(features:dict, split:Split, n_classes:int=5, n_images:int=100, seed:int=0):
    """t-SNE of the same images by several networks (Figure 3): `features` has title -> (N, D) of all images of the split

    Returns a dict title -> points (M, 2), the classes (M) of the points, the names of the classes, and the rows (M) of the split.
    """
    rng = np.random.default_rng(seed)
    classes = rng.choice(len(split.vocab), min(n_classes, len(split.vocab)), replace=False)
    rows = np.concatenate([rng.permutation(np.flatnonzero(split.y == c))[:n_images] for c in classes])
    classes,points = np.sort(classes),{}
    for title,h in features.items():
        u = F.normalize(h[torch.from_numpy(rows).to(h.device)], dim=1).cpu().numpy()
        points[title] = TSNE(perplexity=min(30, max(1, len(rows)//4)), init='pca', random_state=seed).fit_transform(u)
    return points,np.searchsorted(classes, split.y[rows]),[split.vocab[c] for c in classes],rows

def episode_rows(y, n_way:int=5, k_shot:int=1, n_query:int=15, seed:int=0) -> tuple[np.ndarray, np.ndarray]:
    "Rows of the support (n_way * k_shot) and of the queries (n_way * n_query) of an episode of images with classes `y`, class by class"
    return tuple(rows[0].ravel() for rows in next(sample_episodes(y, n_way, k_shot, n_query, 1, seed)))

def episode_relatedness(support:torch.Tensor, query:torch.Tensor, temperatures:tuple=TEMPERATURES) -> dict:
    """The weights of an episode at several temperatures (Figure 5), from the features (NS, D) and (NQ, D) of its images

    Returns a dict T -> (whole, decoupled), two arrays (NS, NQ): the softmax of the relatedness over the whole matrix, and over each of its
    rows (Eq. 11).
    """
    R = relatedness(support[None], query[None])
    return {T:tuple(log_relatedness(R, T, decouple).exp().reshape(R.shape[1:]).cpu().numpy() for decouple in (False, True))
            for T in temperatures}
