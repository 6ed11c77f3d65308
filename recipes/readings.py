"""Variants of stage two and of stage one where the paper leaves a choice open, all trained on the same number of images

    python recipes/readings.py --data cifar-fs.zip              # ResNet-12 teacher, 90 epochs: a GPU's work
    python recipes/readings.py --demo                           # eight minutes on two cores, no download

Each row changes one setting of BASE or combines changes. Each stage two trains on --images in one epoch, so that no epoch is chosen. The
validation classes compare the variants; docs/method.md shows what was measured.
"""
from typing import Annotated

from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.core.errors import UserError
from grdd_fastai.experiments.table import CL, EL, GR, table
from grdd_fastai.plots import plot_rows, save_figure
from grdd_fastai.settings import all_declared, between, checked, exact_flags
from grdd_fastai.stage_two import PRESETS, StageTwo

LITERAL = {k:v for k,v in PRESETS['paper'].values().items() if k not in ('jitter', 'augment', 'seed')} # flags set these for all rows
BASE = LITERAL | dict(n_way=20, n_query=6, T=0.1, scale=10., mean=True, schedule='one_cycle', lr=1e-2, epochs=1)
BEST = dict(reduction='mean', gamma=1., kl_weight=5., teacher_view='same', lr=2e-2) # changes that did best together
SET_BY_THE_ROWS = [s.flag for s in all_declared(StageTwo).values() if s.name in (*BASE, 'n_episodes')] # their flags would change no row
SHOT5 = dict(n_way=10, k_shot=5, n_query=9)

CHANGES = { # row -> (kind of row, changes of BASE)
    'CL+EL':                    (EL, {}),
    'CL+EL lr=0.003':           (EL, dict(lr=3e-3)),
    'CL+EL lr=0.02':            (EL, dict(lr=2e-2)),
    'CL+EL lr=0.03':            (EL, dict(lr=3e-2)),
    'CL+EL lr=0.1':             (EL, dict(lr=1e-1)),
    'CL+EL muon lr=0.0003':     (EL, dict(opt='muon', lr=3e-4)),
    'CL+EL muon lr=0.001':      (EL, dict(opt='muon', lr=1e-3)),
    'CL+EL muon lr=0.003':      (EL, dict(opt='muon', lr=3e-3)),
    'CL+EL muon lr=0.01':       (EL, dict(opt='muon', lr=1e-2)),
    'CL+EL 5-way':              (EL, dict(n_way=5, n_query=15)),
    'base':                     (GR, {}),
    'lr=0.001':                 (GR, dict(lr=1e-3)),
    'lr=0.003':                 (GR, dict(lr=3e-3)),
    'lr=0.03':                  (GR, dict(lr=3e-2)),
    'step schedule':            (GR, dict(schedule='step', lr=3e-3)),
    'T=0.05':                   (GR, dict(T=0.05)),
    'T=0.25 (T multiplies)':    (GR, dict(T=0.25)),
    'T=1':                      (GR, dict(T=1.)),
    'T=4':                      (GR, dict(T=4.)),
    'T=4 weight T squared':     (GR, dict(T=4., T_squared=True)),
    'T=0.25 weight 4':          (GR, dict(T=0.25, kl_weight=4.)),
    'reverse KL':               (GR, dict(reverse=True)),
    'mean of groups':           (GR, dict(reduction='mean')),
    'mean of groups gamma=1':   (GR, dict(reduction='mean', gamma=1.)),
    'gamma=0':                  (GR, dict(gamma=0.)),
    'gamma=1':                  (GR, dict(gamma=1.)),
    'logit scale 1':            (GR, dict(scale=1.)),
    'logit scale 20':           (GR, dict(scale=20.)),
    'centred features':         (GR, dict(center=True)),
    'teacher sees augmented':   (GR, dict(teacher_view='same')),
    'teacher logits':           (GR, dict(teacher_output='logits')),
    'teacher probabilities':    (GR, dict(teacher_output='probabilities')),
    'teacher probabilities mean of groups': (GR, dict(teacher_output='probabilities', reduction='mean')),
    'teacher probabilities mean of groups gamma=1': (GR, dict(teacher_output='probabilities', reduction='mean', gamma=1.)),
    'teacher logits mean of groups gamma=1': (GR, dict(teacher_output='logits', reduction='mean', gamma=1.)),
    'teacher probabilities mean of groups gamma=1 augmented': (GR, dict(teacher_output='probabilities', reduction='mean', gamma=1.,
                                                                        teacher_view='same')),
    'mean of groups gamma=1 weight 5 augmented': (GR, dict(reduction='mean', gamma=1., kl_weight=5., teacher_view='same')),
    'best':                     (GR, BEST),
    'best lr=0.05':             (GR, BEST | dict(lr=5e-2)),
    'best lr=0.1':              (GR, BEST | dict(lr=1e-1)),
    'best muon lr=0.001':       (GR, BEST | dict(opt='muon', lr=1e-3)),
    'best muon lr=0.003':       (GR, BEST | dict(opt='muon', lr=3e-3)),
    'best muon lr=0.01':        (GR, BEST | dict(opt='muon', lr=1e-2)),
    'best albumentations':      (GR, BEST | dict(augment='albumentations')),
    'best clean teacher':       (GR, BEST | dict(teacher_view='clean')),
    'best T=0.25':              (GR, BEST | dict(T=0.25)),
    'best centred':             (GR, BEST | dict(center=True)),
    'best reverse KL':          (GR, BEST | dict(reverse=True)),
    'best 5-way':               (GR, BEST | dict(n_way=5, n_query=15)),
    'best 5-way 4 episodes a step': (GR, BEST | dict(n_way=5, n_query=15, episodes_per_step=4)),
    'best from scratch':        (GR, BEST | dict(init='random')),
    'best from itself shared':  (GR | dict(phi='student'), BEST),
    'best from itself independent': (GR | dict(phi='student', independent=True), BEST),
    'gamma=1 augmented':        (GR, dict(gamma=1., teacher_view='same')),
    'teacher itself shared':    (GR | dict(phi='student'), {}),
    'teacher itself independent': (GR | dict(phi='student', independent=True), {}),
    'student from scratch':     (GR, dict(init='random')),
    '5-way':                    (GR, dict(n_way=5, n_query=15)),
    '5-way 4 episodes a step':  (GR, dict(n_way=5, n_query=15, episodes_per_step=4)),
    '10-way':                   (GR, dict(n_way=10, n_query=13)),
    '20-way 15 queries':        (GR, dict(n_query=15)),
    '5-shot mean':              (GR, SHOT5),
    '5-shot sum':               (GR, SHOT5 | dict(mean=False)),
}
PAPER = { # row -> changes of the settings that the paper describes
    'paper':                    {},
    'paper wide':               dict(n_way=20, n_query=6),
    'paper lr=0.01':            dict(lr=1e-2),
}
ONE = dict(rotation=False, rotation_from='logits', head='linear', smoothing=0., jitter=True, schedule='one_cycle', lr=0.1, opt='sgd',
           bs=64)
MUON = dict(opt='muon', lr=0.02, bs=128)
STAGE_ONE = { # row -> changes of ONE for CL alone; rows with rotation train a quarter of the epochs, since each has four times the images
    'stage one':                            {},
    'stage one cosine classifier':          dict(head='cosine'),
    'stage one no jitter':                  dict(jitter=False),
    'stage one albumentations':             dict(augment='albumentations'),
    'stage one label smoothing':            dict(smoothing=0.1),
    'stage one muon':                       MUON,
    'stage one muon cosine classifier':     MUON | dict(head='cosine'),
    'stage one best':                       MUON | dict(head='cosine', jitter=False),
    'stage one flattened':                  dict(arch='convnet4_flat'),
    'stage one poly lr=0.05':               dict(schedule='poly', lr=0.05),
    'stage one poly lr=0.1':                dict(schedule='poly', lr=0.1),
    'stage one rotation':                   dict(rotation=True),
    'stage one rotation from probabilities': dict(rotation=True, rotation_from='probabilities'),
}


def sized(two, images):
    "A copy of the settings `two` with so many episodes per epoch that the training sees `images` images"
    per_episode = two['n_way'] * (two['k_shot'] + two['n_query'])
    return two | dict(n_episodes=max(1, round(images/two['epochs']/per_episode)))

def readings(images, epochs):
    "All rows, with `images` images for each stage two and `epochs` epochs for each row on stage one"
    def one(change): return ONE | dict(epochs=epochs//4 if change.get('rotation') else epochs) | change
    def versus(k, *others): return dict(versus=[o for o in others if o != k])
    rows = {'CL':CL}
    for k,(kind,change) in CHANGES.items(): rows[k] = kind | versus(k, 'CL', 'CL+EL') | dict(stage_two=sized(BASE | change, images))
    literal = LITERAL | dict(epochs=BASE['epochs'])
    for k,change in PAPER.items(): rows[k] = GR | versus(k, 'CL', 'CL+EL') | dict(stage_two=sized(literal | change, images))
    for k,change in STAGE_ONE.items(): rows[k] = CL | versus(k, 'stage one') | dict(stage_one=one(change))
    return rows

@call_parse
@exact_flags
@checked
@delegates(table, but=['name', 'all_rows', 'preset', *SET_BY_THE_ROWS])
def main(
    images:Annotated[int, 'number of images that each stage two trains on (400000; demo: 2000)', between(1, 10**9)]=None,
    stage_one_epochs:Annotated[int, 'epochs of the rows on stage one, a multiple of 4 (40; demo: 4)', between(1, 10**6)]=None,
    demo:bool=False, # small settings, and the embedded data set unless --data is given
    **kwargs
):
    "Measure the choices that the paper leaves open"
    images = images or (2000 if demo else 400_000)
    stage_one_epochs = stage_one_epochs or (4 if demo else 40)
    if stage_one_epochs % 4:
        raise UserError(f'--stage-one-epochs is {stage_one_epochs}: it must be a multiple of 4, a quarter is trained with rotation')
    made = table('readings', readings(images, stage_one_epochs), demo=demo, **kwargs)
    if len(made.scored): save_figure(plot_rows(made.scored, made.title('Readings')), made.path('readings'))
    made.check()
