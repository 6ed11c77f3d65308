"""Figures 3 and 5 of arXiv 2107.05583: embeddings of CL, CL+EL and GRDD, and the teacher's relatedness at several temperatures T

    python recipes/figures.py --data cifar-fs.zip               # uses the networks of the other recipes in --out, or trains them
    python recipes/figures.py --demo                            # two minutes on two cores, no download

Figure 3 is a t-SNE of the same images of the same novel classes in each panel. Figure 5 shows one episode of the validation classes;
'whole matrix' is without the relatedness decoupling. Nothing is scored on the novel classes.
"""
from typing import Annotated

import pandas as pd
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.core.errors import UserError
from grdd_fastai.core.storage import atomic_write
from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.experiments.table import CL, EL, GR, table
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.figures import episode_relatedness, episode_rows, tsne_points
from grdd_fastai.plots import plot_relatedness, plot_tsne, save_figure
from grdd_fastai.settings import at_least, between, checked, exact_flags

ROWS = {'CL': CL, 'CL+EL': EL, 'GRDD': GR}

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
    features = {k:embed(net, plain_dl(data, 'test'))[0] for k,net in nets.items()}
    points,y,names,rows = tsne_points(features, data.test, classes, images, seed)
    labels = [names[c] for c in y]
    tidy = pd.concat([pd.DataFrame(dict(network=k, row=rows, label=labels, x=p[:, 0], y=p[:, 1])) for k,p in points.items()])
    atomic_write(out/'figure3.csv', tidy.to_csv(index=False))
    save_figure(plot_tsne(points, y, names, made.title('t-SNE of novel classes')), out/'figure3.png')

    h,y = embed(made.nets['GRDD', seed]['teacher'].net, plain_dl(data, 'val'))
    support,query = episode_rows(y.cpu().numpy(), seed=seed)
    panels = episode_relatedness(h[support], h[query])
    tidy = pd.concat([pd.DataFrame(dict(T=t, softmax=name, support=i, query=range(w.shape[1]), weight=w[i]))
                      for t,pair in panels.items() for name,w in zip(('whole', 'decoupled'), pair) for i in range(len(w))])
    atomic_write(out/'figure5.csv', tidy.to_csv(index=False))
    save_figure(plot_relatedness(panels, n_query=15, title=made.title('Relatedness of an episode, by the teacher')), out/'figure5.png')
    made.check()
