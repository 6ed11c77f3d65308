"""Compare ways to relate images in stage two, with students that start from random weights

    python recipes/pairs.py --data cifar-fs.zip                 # trains a ResNet-12 teacher for 90 epochs first, which needs a GPU
    python recipes/pairs.py --demo                              # two minutes on two cores, no download

The paper relates the support images of an episode to its queries. Here each image of an episode is also related to all others, at the
same cost. The teacher's features of 20 views of each image are computed once, before the training of the first row.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.experiments.table import GR, table
from grdd_fastai.plots import plot_rows, save_figure
from grdd_fastai.settings import exact_flags

START = dict(init='random', teacher_view='views')
def row(*versus, **changes): return GR | dict(versus=versus, stage_two=START | changes)

ROWS = {
    'all pairs':                         row(pairs='all'),
    'all pairs whole matrix':            row('all pairs', pairs='all', decouple=False),
    'all pairs without labels':          row('all pairs', pairs='all', gamma=0.),
    'support to queries':                row('all pairs'),
    'support to queries without labels': row('all pairs without labels', 'support to queries', gamma=0.),
}

@call_parse
@exact_flags
@delegates(table, but=['name', 'all_rows', 'init', 'teacher_view', 'pairs', 'decouple']) # which the rows set
def main(**kwargs):
    "Which images stage two relates to which"
    made = table('pairs', ROWS, **kwargs)
    if len(made.scored): save_figure(plot_rows(made.scored, made.title('Which images are related')), made.path('pairs'))
    made.check()
