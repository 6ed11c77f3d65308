"""Figures of the experiments: matplotlib Figures of arrays and DataFrames, legible in grey and for colour-blind readers."""
import io
import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from .core.distributed import rank_world
from .core.storage import atomic_write

__all__ = ['COLORS', 'MARKERS', 'plot_rows', 'plot_costs', 'plot_sweep', 'plot_tsne', 'plot_relatedness', 'save_figure', 'plain', 'label']


COLORS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#F0E442', '#000000') # the palette of Okabe and Ito
MARKERS = 'osD^vPX*'


def plot_rows(
    scored:pd.DataFrame, # DataFrame of `table` with the columns row, shot, seed, split, n, accuracy, ci95
    title:str='', # title of the figure
) -> Figure:
    """A line per row and a mark per shot: the mean over seeds with the 95% interval over episodes, and a small tick for each seed

    On the novel classes an open diamond marks the paper's accuracy, where `scored` has it in a column `paper`.
    """
    shots = sorted(scored.shot.unique())
    rows,split,marked = list(dict.fromkeys(scored.row)),scored.split.iloc[0],None
    fig,ax = plt.subplots(figsize=(5.9 + .07*max(map(len, rows)), 1.4 + .27*len(rows)*max(1, .7*len(shots))), layout='constrained')
    for i,shot in enumerate(shots):
        for j,row in enumerate(rows):
            runs = scored[(scored.shot == shot) & (scored.row == row)]
            if runs.empty: continue
            y = j + .25*(i - (len(shots)-1)/2)
            mean,ci = runs.accuracy.mean(),runs.ci95.mean()
            ax.errorbar(mean, y, xerr=ci, fmt=MARKERS[i], color=COLORS[i], ms=6, capsize=3, lw=1.3, label=None if j else f'{shot}-shot')
            if len(runs) > 1: ax.plot(runs.accuracy, [y]*len(runs), '|', color='black', ms=9, mew=1)
            right = max(mean + ci, runs.accuracy.max())
            paper = runs.paper.iloc[0] if 'paper' in runs and split == 'novel' else None
            if paper and not pd.isna(paper):
                marked, = ax.plot(paper, y, 'D', color='0.35', mfc='none', ms=6)
                if right < paper < right + 4: right = paper # the number stands beside the diamond
            ax.annotate(f'{mean:.1f}', (right, y), (6, 0), textcoords='offset points', va='center', fontsize=8)
    classes = dict(val='validation').get(split, split)
    ax.set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - .4, -.6),
           xlabel=f'accuracy on the {classes} classes, %\n95% interval, {scored.n.iloc[0]:,} episodes')
    ax.margins(x=.12)
    ax.set_title(title, fontsize=10, loc='left')
    if marked: marked.set_label('the paper')
    handles,labels = ax.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] == 'the paper')
    if len(labels) > 1: # the legend stands beside the axes, so that it covers no data
        ax.legend([handles[i] for i in order], [labels[i] for i in order], frameon=False, loc='upper left', bbox_to_anchor=(1, 1))
    plain(ax)
    return fig


def plot_costs(
    table:pd.DataFrame, # DataFrame of `compare_methods` with the columns method, shot, split, accuracy, images_with_others, taught
    title:str='', # title of the figure
) -> Figure:
    """A panel per shot: accuracy against the images of a training and of those that it needs; a mark per method, a dash per seed

    A filled mark is `taught` by a network from elsewhere, whose own training is not counted.
    """
    shots = sorted(table.shot.unique())
    fig,axes = plt.subplots(1, len(shots), figsize=(5.4*len(shots), 4.6), layout='constrained', squeeze=False)
    for ax,shot in zip(axes[0], shots):
        rows = [(name, runs.images_with_others.mean()/1e6, runs) for name,runs in table[table.shot == shot].groupby('method', sort=False)]
        labels = sorted((runs.accuracy.mean(), name, x) for name,x,runs in rows)
        gap = .035*max(1., labels[-1][0] - labels[0][0])
        for i,(_,x,runs) in enumerate(rows):
            ax.plot(x, runs.accuracy.mean(), 'o', color=COLORS[i % 8], mfc=COLORS[i % 8] if runs.taught.all() else 'none', ms=7)
            if len(runs) > 1: ax.plot([x]*len(runs), runs.accuracy, '_', color='black', ms=9, mew=1)
        at = -float('inf')
        for y,name,x in labels: # names stand to the right, moved up where they would overlap
            at = max(y, at + gap)
            ax.annotate(name, (x, y), (1.02, at), textcoords=ax.get_yaxis_transform(), va='center', fontsize=7,
                        arrowprops=dict(arrowstyle='-', lw=.3, color='0.6'))
        classes = dict(val='validation').get(table.split.iloc[0], table.split.iloc[0])
        ax.set(xlabel='million images seen in training\n(with those of its start and of a teacher trained for it)',
               ylabel=f'{shot}-shot accuracy on the {classes} classes, %')
        plain(ax)
    fig.suptitle(f'{title}\nfilled marks learn from the teacher, whose training is not counted', fontsize=10)
    return fig


def plot_sweep(
    sweeps:dict, # symbol of a hyper-parameter -> DataFrame with the columns value, shot, seed, accuracy, ci95
    references:dict, # name -> accuracy in percent, drawn as a horizontal line
    ylabel:str='5-way accuracy, %', # label of the vertical axis
    title:str='', # title of the figure
) -> Figure:
    "A panel per hyper-parameter: accuracy against its values, with a line for each seed and shot"
    fig,axes = plt.subplots(1, len(sweeps), figsize=(3.6*len(sweeps) + .6, 3.2), sharey=True, layout='constrained', squeeze=False)
    for ax,(symbol,sweep) in zip(axes[0], sweeps.items()):
        values = sorted(sweep.value.unique())
        for i,((seed,shot),line) in enumerate(sweep.groupby(['seed', 'shot'])):
            at = [values.index(v) for v in line.value]
            order = np.argsort(at)
            ax.errorbar(np.take(at, order), line.accuracy.to_numpy()[order], line.ci95.to_numpy()[order], marker=MARKERS[i % 8],
                        color=COLORS[i % 8], capsize=3, lw=1.5, label=f'{shot}-shot, seed {seed}')
        for (name,accuracy),style in zip(references.items(), itertools.cycle(('--', ':', '-.', (0, (6, 2, 1, 2, 1, 2))))):
            ax.axhline(accuracy, ls=style, color='0.4', lw=1.2, label=name)
        ax.set(xticks=range(len(values)), xticklabels=[f'{v:g}' for v in values], xlabel=symbol)
        plain(ax)
    if title: fig.suptitle(title, fontsize=10)
    axes[0,0].set_ylabel(ylabel)
    axes[0,-1].legend(frameon=False, fontsize=8, loc='upper left', bbox_to_anchor=(1, 1))
    return fig


def plot_tsne(
    panels:dict, # title -> points (N, 2) of the same N images
    y:np.ndarray, # class of each image (N)
    names:list, # name of each class, indexed by class
    title:str='', # title of the figure
) -> Figure:
    "A panel per embedding, with a colour and a marker for each class"
    fig,axes = plt.subplots(1, len(panels), figsize=(3.3*len(panels), 3.9), layout='constrained', squeeze=False)
    for ax,(name,points) in zip(axes[0], panels.items()):
        for i,c in enumerate(np.unique(y)):
            ax.scatter(*points[y == c].T, s=14, marker=MARKERS[i % 8], color=COLORS[i % 8], alpha=.75, linewidths=0, label=label(names[c]))
        ax.set(title=name, xticks=[], yticks=[])
    if title: fig.suptitle(title, fontsize=10)
    fig.legend(*axes[0,0].get_legend_handles_labels(), loc='outside lower center', ncols=len(np.unique(y)), frameon=False, fontsize=9,
               markerscale=1.6)
    return fig


def plot_relatedness(
    panels:dict, # T -> (whole, decoupled): the softmax over the whole matrix (NS, NQ), and the softmax over each of its rows
    k_shot:int=1, # support images of a class, which stand together
    n_query:int|None=None, # queries of a class, which stand together; None: no borders of classes are drawn
    title:str='', # title of the figure
) -> Figure:
    "A column per temperature: the weights without and with decoupling, as multiples of the uniform weight of the same softmax"
    fig,axes = plt.subplots(2, len(panels), figsize=(1.9*len(panels) + 1, 3.1), layout='constrained', squeeze=False, sharex=True,
                            sharey=True)
    for column,(T,(whole,decoupled)) in zip(axes.T, panels.items()):
        for ax,w,uniform in zip(column, (whole, decoupled), (1/whole.size, 1/whole.shape[1])):
            ratio = w/uniform
            image = ax.imshow(ratio, aspect='auto', cmap='cividis', norm=LogNorm(1/4, 4), interpolation='nearest')
            ax.set_title(f'{ratio.min():.2g} to {ratio.max():.2g}', fontsize=8)
            ax.tick_params(labelsize=7)
            for x in range(n_query or w.shape[1], w.shape[1], n_query or 1): ax.axvline(x - .5, color='white', lw=.8)
            for y in range(k_shot, len(w), k_shot) if n_query else (): ax.axhline(y - .5, color='white', lw=.8)
        column[0].annotate(f'T = {T:g}', (.5, 1.28), xycoords='axes fraction', ha='center', fontsize=10)
        column[1].set_xlabel('query', fontsize=8)
    for ax,name in zip(axes[:, 0], ('whole matrix', 'decoupled')): ax.set_ylabel(f'{name}\nsupport', fontsize=8)
    if title: fig.suptitle(title, fontsize=10)
    bar = fig.colorbar(image, ax=axes, extend='both', ticks=[1/4, 1/2, 1, 2, 4])
    bar.ax.set_yticklabels(['1/4', '1/2', '1', '2', '4'], fontsize=8)
    bar.ax.minorticks_off()
    bar.set_label('weight / uniform weight', fontsize=8)
    return fig


def save_figure(fig, path):
    "Write a figure to `path` (in a distributed run only the first process writes), close it, and return `path`"
    if rank_world()[0] == 0:
        content = io.BytesIO()
        fig.savefig(content, dpi=160, format=Path(path).suffix[1:])
        atomic_write(path, content.getvalue())
    plt.close(fig)
    return path

def label(name) -> str:
    "A name as a label: matplotlib would read $ as mathematics, and would leave out a name that begins with _ in a legend"
    return ('\u200b' if str(name).startswith('_') else '') + str(name).replace('$', r'\$')

def plain(ax):
    "Remove the box around the axes, and draw a light grid behind the data"
    ax.spines[['top', 'right']].set_visible(False)
    ax.grid(alpha=.25, lw=.6)
    ax.set_axisbelow(True)
