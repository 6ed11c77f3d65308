"""Compare the relatedness with other things that a student can learn from a teacher, with students that start from random weights

    python recipes/distillations.py --data cifar-fs.zip         # trains a ResNet-12 teacher for 90 epochs first, which needs a GPU
    python recipes/distillations.py --demo                      # three minutes on two cores, no download

All rows see the same views of the same images and learn from the labels of the episodes (L_rt), the first row from these alone. Each other
row adds a term that compares the student with the teacher; the last two rows add two terms. The teacher's features of 20 views of each
image are computed once, before the training of the first row.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.distillation import TERMS, WEIGHTS
from grdd_fastai.experiments.table import GR, table
from grdd_fastai.methods.catalogue import only
from grdd_fastai.plots import plot_rows, save_figure
from grdd_fastai.settings import exact_flags

START = dict(init='random', teacher_view='views', pairs='all')
BOTH = ('labels', 'relatedness')
RELATEDNESS = START | only('kl_weight')
def instead(weight): return GR | dict(versus=BOTH, stage_two=START | only(weight))
def also(weight): return GR | dict(versus=('relatedness',), stage_two=RELATEDNESS | {weight:WEIGHTS[weight]})

ROWS = {
    'labels':                             GR | dict(stage_two=START | dict(kl_weight=0.)),
    'relatedness':                        GR | dict(versus=('labels',), stage_two=RELATEDNESS), # of all pairs
    'relatedness of support and queries': GR | dict(versus=BOTH, stage_two=RELATEDNESS | dict(pairs='episode')), # as in the paper
    'logits':                             instead('kd_weight'),
    'DKD':                                instead('dkd_weight'),
    'DIST':                               instead('dist_weight'),
    'features':                           instead('regression_weight'),
    'CRD':                                instead('crd_weight'),
    'RKD':                                instead('rkd_weight'),
    'similarity':                         instead('similarity_weight'),
    'relatedness and logits':             also('kd_weight'),
    'relatedness and features':           also('regression_weight'),
}

@call_parse
@exact_flags
@delegates(table, but=['name', 'all_rows', 'init', 'teacher_view', 'pairs', 'kl_weight', *TERMS]) # which the rows set
def main(**kwargs):
    "What a student learns from a teacher"
    made = table('distillations', ROWS, **kwargs)
    if len(made.scored): save_figure(plot_rows(made.scored, made.title('What the student learns from')), made.path('distillations'))
    made.check()
