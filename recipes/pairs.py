"""Which images stage two relates to which, and with how much patience: rows that start from random weights, without a stage one

    python recipes/pairs.py --data cifar-fs.zip                 # ResNet-12 teacher, 90 epochs: a GPU's work
    python recipes/pairs.py --demo                              # two minutes on two cores, no download

The paper relates the support images of an episode to its queries. Here each image of the batch is also related to all others, at the same
cost. All rows know the teacher's features of the same 20 views of each image beforehand, so that a step costs what the student costs.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.experiments.plots import plot_rows, save_figure
from grdd_fastai.experiments.table import GR, table
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
    if len(made.scored): save_figure(plot_rows(made.scored, 'Which images are related'), made.path('pairs'))
    made.check()
