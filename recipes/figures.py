"""Figures 3 and 5 of arXiv 2107.05583: embeddings of CL, CL+EL and GRDD, and the teacher's relatedness at several temperatures T

    python recipes/figures.py --data cifar-fs.zip               # uses the networks of the other recipes in --out, or trains them
    python recipes/figures.py --demo                            # two minutes on two cores, no download

Figure 3 is a t-SNE of the same images of the same novel classes in each panel. Figure 5 shows one episode of the validation classes;
'whole matrix' is without the relatedness decoupling. Nothing is scored on the novel classes.
"""
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from fastcore.meta import delegates
from fastcore.script import call_parse
from sklearn.manifold import TSNE

from grdd_fastai.core.errors import UserError
from grdd_fastai.core.storage import atomic_write
from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.data.episodes import sample_episodes
from grdd_fastai.experiments.plots import plot_relatedness, plot_tsne, save_figure
from grdd_fastai.experiments.table import CL, EL, GR, table
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.losses import log_relatedness, relatedness
from grdd_fastai.settings import at_least, between, checked, exact_flags

ROWS = {'CL': CL, 'CL+EL': EL, 'GRDD': GR}
T = (0.05, 0.1, 0.5, 1., 4.)


def tsne(nets, data, n_classes, n_images, seed):
    "t-SNE of the networks `nets` (title -> network): title -> points (N, 2), classes (N), names of the classes, and a tidy DataFrame"
    split = data.test
    rng = np.random.default_rng(seed)
    classes = rng.choice(len(split.vocab), min(n_classes, len(split.vocab)), replace=False)
    rows = np.concatenate([rng.permutation(np.flatnonzero(split.y == c))[:n_images] for c in classes])
    y = np.searchsorted(np.sort(classes), split.y[rows])
    points = {}
    for title,net in nets.items():
        h = torch.nn.functional.normalize(embed(net, plain_dl(data, 'test'))[0][rows], dim=1).cpu().numpy()
        points[title] = TSNE(perplexity=min(30, len(rows)//4), init='pca', random_state=seed).fit_transform(h)
    names = [split.vocab[c] for c in np.sort(classes)]
    labels = [names[c] for c in y]
    tidy = pd.concat([pd.DataFrame(dict(network=k, row=rows, label=labels, x=p[:, 0], y=p[:, 1])) for k,p in points.items()])
    return points,y,names,tidy

def relatedness_over_T(teacher, data, seed):
    "Softmax of the relatedness of one 5-way 1-shot episode: T -> (whole, decoupled), each of shape (NS, NQ), and a tidy DataFrame"
    h,y = embed(teacher, plain_dl(data, 'val'))
    support,query = (torch.as_tensor(r[:1]).flatten(1) for r in next(sample_episodes(y, n_episodes=1, seed=seed)))
    R = relatedness(h[support], h[query])
    panels = {t:tuple(log_relatedness(R, t, decouple).exp().reshape(R.shape[1:]).cpu().numpy() for decouple in (False, True)) for t in T}
    tidy = pd.concat([pd.DataFrame(dict(T=t, softmax=name, support=i, query=range(w.shape[1]), weight=w[i]))
                      for t,pair in panels.items() for name,w in zip(('whole', 'decoupled'), pair) for i in range(len(w))])
    return panels,tidy

@call_parse
@exact_flags
@checked
@delegates(table, but=['name', 'all_rows', 'rows', 'seeds', 'score', 'results'])
def main(
    classes:Annotated[int, 'number of novel classes in Figure 3', at_least(1)]=5,
    images:Annotated[int, 'number of images of each class in Figure 3', at_least(1)]=100,
    seed:Annotated[int, 'seed of the networks, the images, the t-SNE and the episode', between(0, 2**32 - 1)]=0,
    **kwargs
):
    "Figures 3 and 5: embeddings and relatedness"
    if classes*images < 8: raise UserError(f'{classes} classes of {images} images are too few to show: give --classes or --images more')
    made = table('figures', ROWS, seeds=seed, **kwargs)
    if len(made.scored) < len(ROWS): return made.check() # the program was stopped, or a row failed
    nets = {k:made.nets[k, seed]['net'].net for k in ROWS}
    out = made.store.out
    data = made.store.data
    points,y,names,tidy = tsne(nets, data, classes, images, seed)
    atomic_write(out/'figure3.csv', tidy.to_csv(index=False))
    save_figure(plot_tsne(points, y, names), out/'figure3.png')
    panels,tidy = relatedness_over_T(made.nets['GRDD', seed]['teacher'].net, data, seed)
    atomic_write(out/'figure5.csv', tidy.to_csv(index=False))
    save_figure(plot_relatedness(panels), out/'figure5.png')
    made.check()
