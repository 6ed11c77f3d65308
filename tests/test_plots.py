"""Figures show the numbers that they are given."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from grdd_fastai.plots import plot_costs, plot_relatedness, plot_rows, plot_sweep, plot_tsne


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def scored(split='novel', paper=(64.6, None)):
    return pd.DataFrame([dict(row=row, shot=shot, seed=seed, split=split, n=10_000, accuracy=60 + 10*j + shot + seed, ci95=.2,
                              paper=paper[j] if shot == 1 else None)
                         for j,row in enumerate(('CL', 'CL+EL')) for shot in (1, 5) for seed in (0, 1)])

def texts(fig): return [t.get_text() for t in fig.axes[0].get_legend().get_texts()]

def test_rows_show_means_seeds_and_the_papers_value():
    fig = plot_rows(scored(), 'a title')
    ax = fig.axes[0]
    assert [t.get_text() for t in ax.texts] == ['61.5', '71.5', '65.5', '75.5'] and ax.get_title(loc='left') == 'a title'
    seeds = sorted(x for line in ax.lines if line.get_marker() == '|' and len(line.get_xdata()) == 2 for x in line.get_xdata())
    assert {61, 62, 71, 72, 65, 66, 75, 76} <= set(seeds)
    assert [line.get_xdata()[0] for line in ax.lines if line.get_marker() == 'D'] == [64.6]
    assert texts(fig) == ['1-shot', '5-shot', 'the paper']

def test_costs_show_each_method_at_its_images_and_the_mean_of_its_seeds():
    "Names do not overlap, and the mark of a method that a network from elsewhere teaches is filled"
    rows = dict(a=(4e5, 60., False), b=(4e5, 60.01, True), c=(9e5, 55., False))
    table = pd.DataFrame([dict(method=k, shot=shot, seed=seed, split='val', accuracy=y + shot + seed, images_with_others=x, taught=taught)
                          for k,(x,y,taught) in rows.items() for shot in (1, 5) for seed in (0, 1)])
    fig = plot_costs(table, 'a title')
    assert len(fig.axes) == 2
    for ax,shot in zip(fig.axes, (1, 5), strict=True):
        marks = [(line.get_xdata()[0], line.get_ydata()[0], line.get_markerfacecolor() != 'none')
                 for line in ax.lines if line.get_marker() == 'o']
        want = ((.4, 60.5, False), (.4, 60.51, True), (.9, 55.5, False))
        assert marks == [(x, pytest.approx(y + shot), filled) for x,y,filled in want]
        seeds = [sorted(line.get_ydata()) for line in ax.lines if line.get_marker() == '_']
        assert seeds[0] == [60 + shot, 61 + shot] and len(seeds) == 3
        assert [t.get_text() for t in ax.texts] == ['c', 'a', 'b'] # from below
        heights = [t.xyann[1] for t in ax.texts]
        assert heights[2] - heights[1] > .1 and heights == sorted(heights)

@pytest.mark.parametrize('split, paper', [('val', (64.6, None)), ('novel', (None, None))])
def test_the_papers_value_stands_beside_novel_classes_only(split, paper):
    fig = plot_rows(scored(split, paper))
    assert texts(fig) == ['1-shot', '5-shot'] and 'D' not in [line.get_marker() for line in fig.axes[0].lines]

def test_no_legend_covers_the_data():
    "Legends lie beside their axes"
    sweep = pd.DataFrame([dict(value=v, shot=1, seed=0, accuracy=60 + v, ci95=.3) for v in (0, 1, 4)])
    for fig in (plot_rows(scored()), plot_sweep(dict(T=sweep), {'CL, 1-shot':59.}, title='b')):
        fig.canvas.draw()
        ax = fig.axes[-1]
        assert not ax.get_legend().get_window_extent().overlaps(ax.get_window_extent())

def test_tsne_has_a_title_and_one_for_each_panel():
    fig = plot_tsne(dict(one=np.eye(4)[:, :2], two=np.eye(4)[:, :2]), np.array([0, 0, 1, 1]), ['cat', 'dog'], 'both')
    assert [ax.get_title() for ax in fig.axes] == ['one', 'two'] and fig.get_suptitle() == 'both'
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ['cat', 'dog']
    assert plot_tsne(dict(one=np.eye(4)[:, :2]), np.array([0, 0, 1, 1]), ['cat', 'dog']).get_suptitle() == ''

def test_borders_of_classes_are_drawn_between_them():
    w = np.full((4, 6), 1/24)
    fig = plot_relatedness({1.:(w, w*4)}, k_shot=2, n_query=3)
    lines = fig.axes[0].lines
    assert sorted(x for line in lines for x in line.get_xdata() if len({*line.get_xdata()}) == 1) == [2.5, 2.5]
    assert sorted(y for line in lines for y in line.get_ydata() if len({*line.get_ydata()}) == 1) == [1.5, 1.5]
    assert not plot_relatedness({1.:(w, w*4)}).axes[0].lines and (fig.axes[0].images[0].get_array() == 1).all()
