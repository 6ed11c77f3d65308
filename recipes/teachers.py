"""Compare teachers, alone and by the students that learn from them

    python recipes/teachers.py --data cifar-fs.zip              # trains six ResNet-12s for 90 epochs each: a GPU's work
    python recipes/teachers.py --demo                           # five minutes on two cores, no download

The teachers of the first rows differ in one setting of stage one. The distilled teacher is the first one after a stage two in which it
learns from itself, by the preset muon for 6 epochs whatever the flags of stage two say; a second one relates each image to all others and
knows its own features of 20 views beforehand. The students start from random weights, relate each image of an episode to all others, and
have the same settings.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.experiments.table import CL, GR, table
from grdd_fastai.plots import plot_rows, save_figure
from grdd_fastai.settings import exact_flags
from grdd_fastai.stage_two import get_preset

SET_BY_THE_ROWS = ('rotation', 'rotations', 'smoothing', 'drop_ramp', 'ema_decay', 'init', 'teacher_view', 'pairs')
OF_ALL_ROWS = ('n_episodes', 'jitter', 'augment', 'seed') # settings that flags change for all rows
ITSELF = {k:v for k,v in get_preset('muon').but(epochs=6).values().items() if k not in OF_ALL_ROWS}
ALL_PAIRS = dict(teacher_view='views', pairs='all')
def teacher(*versus, **changes): return CL | dict(psi='teacher', versus=versus, stage_one=dict(rotation=True) | changes)
def student(phi, *versus): return GR | dict(phi=phi, versus=versus, stage_two=dict(init='random') | ALL_PAIRS)

TEACHER = teacher()
DISTILLED = TEACHER | dict(phi='teacher', versus=['stage one'], stage_two=ITSELF)
ROWS = {
    'stage one':                       TEACHER,
    'stage one with one angle':        teacher('stage one', rotations=1), # one of the four for each image: a quarter of the cost
    'stage one without rotation':      teacher('stage one', rotation=False),
    'stage one with label smoothing':  teacher('stage one', smoothing=0.1),
    'stage one with early DropBlock':  teacher('stage one', drop_ramp=0.5), # at its full rate after half of the steps
    'stage one with moving average':   teacher('stage one', ema_decay=0.999), # of the weights
    'distilled teacher':               DISTILLED,
    'teacher distilled by all pairs':  DISTILLED | dict(stage_two=ITSELF | ALL_PAIRS),
    'student of stage one':            student(TEACHER, 'student of distilled teacher'),
    'student of distilled teacher':    student(DISTILLED),
}

@call_parse
@exact_flags
@delegates(table, but=['name', 'all_rows', *SET_BY_THE_ROWS])
def main(**kwargs):
    "Which teacher a student learns most from"
    made = table('teachers', ROWS, **kwargs)
    if len(made.scored): save_figure(plot_rows(made.scored, made.title('Teachers, and students of them')), made.path('teachers'))
    made.check()
