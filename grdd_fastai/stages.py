"""Both stages as settings: what decides a network, and the Learner and the fit that make it."""
import math

import numpy as np

from .core.errors import UserError
from .data.augment import AUGMENTATIONS, train_augmentation
from .data.blocks import category_dls, episodic_dls
from .stage_one import CATEGORY_CLASSIFIERS, global_learner
from .stage_two import meta_learner
from .training.distributed import effective
from .training.optim import OPTIMISERS

__all__ = ['SCHEDULES', 'STAGE_ONE', 'READINGS', 'stage_two_settings', 'check_settings', 'stage_one', 'stage_two']


SCHEDULES = ('poly', 'step', 'one_cycle')

# Stage one as the paper has it
STAGE_ONE = dict(arch='resnet12', pretrained=False, epochs=90, schedule='poly', lr=0.05, rotation=True, rotation_from='logits',
                 classifier='linear', smoothing=0., jitter=True, augment='batch',
                 opt='sgd', bs=64, seed=0)

# Stage two, reading by reading; docs/readings.md says what each setting is, and what was measured
_PAPER = dict(way=5, shot=1, query=15, episodes=400, per_step=1, epochs=15, schedule='step', lr=1e-3, init='cl', seed=0,
              T=4., gamma=0.2, scale=1., mean=False, decouple=True, kl_weight=1., hinton=False, reverse=False, reduction='sum',
              center=False, teacher_view='clean', teacher_output='features', jitter=True, augment='batch', opt='sgd')
READINGS = dict(
    paper=_PAPER, # the paper's words: T divides the cosines, L_rt reads their sum as it is
    best=_PAPER | dict(way=20, query=6, T=0.1, scale=10., mean=True, gamma=1., reduction='mean', kl_weight=5., teacher_view='same',
                       schedule='one_cycle', lr=2e-2)) # the best on validation classes
READINGS['muon'] = READINGS['best'] | dict(opt='muon', lr=1e-2) # the best from a stage one by Muon, whose weights SGD hardly moves
LABELS_ALONE = dict(best=dict(lr=1e-2), muon=dict(lr=3e-3)) # what CL+EL does best with, where that differs
# of `RelatednessDistiller`
DISTILL = ('decouple', 'kl_weight', 'hinton', 'reverse', 'reduction', 'center', 'teacher_view', 'teacher_output')


def stage_two_settings(reading, labels_alone=False, **changes):
    "Settings of stage two: a reading by name, for GRDD or for CL+EL (`labels_alone`), with what `changes` gives other than None"
    if reading not in READINGS: raise UserError(f'unknown reading {reading!r}: it is one of {", ".join(READINGS)}')
    return READINGS[reading] | (LABELS_ALONE.get(reading, {}) if labels_alone else {}) | {k:v for k,v in changes.items() if v is not None}

BOUNDS = {'test_episodes':'from 1 to 100000000', 'episodes':'from 1 to 100000',
          **dict.fromkeys(('epochs','teacher_epochs','stage_one_epochs','meta_epochs','query','meta_query',
                           'per_step','bs','images','classes'), 'at least 1'), **dict.fromkeys(('way','meta_way'), 'at least 2'),
          **dict.fromkeys(('lr','meta_lr','T','scale','max_minutes'), 'positive'), 'gamma':'at least 0',
          'smoothing':'at least 0 and below 1',
          **dict.fromkeys(('seed','stage_one_seed'), 'from 0 to 4294967295'),
          **dict.fromkeys(('schedule','meta_schedule'), f'one of {", ".join(SCHEDULES)}'), 'teacher_view':'same or clean',
          'classifier':' or '.join(CATEGORY_CLASSIFIERS),
          'augment':' or '.join(AUGMENTATIONS), **dict.fromkeys(('opt','meta_opt'), ' or '.join(OPTIMISERS))}
WITHIN = {'at least 1':lambda v: 1 <= v <= 10**6, 'from 1 to 100000000':lambda v: 1 <= v <= 10**8,
          'from 1 to 100000':lambda v: 1 <= v <= 10**5, 'at least 2':lambda v: v >= 2, 'positive':lambda v: 0 < v < math.inf,
          'at least 0':lambda v: 0 <= v < math.inf,
          'from 0 to 4294967295':lambda v: 0 <= v < 2**32, BOUNDS['schedule']:lambda v: v in SCHEDULES,
          'same or clean':lambda v: v in ('same', 'clean'), BOUNDS['classifier']:lambda v: v in CATEGORY_CLASSIFIERS,
          BOUNDS['augment']:lambda v: v in AUGMENTATIONS, BOUNDS['opt']:lambda v: v in OPTIMISERS,
          'at least 0 and below 1':lambda v: 0 <= v < 1}

WHOLE = [k for k,bound in BOUNDS.items() if bound.startswith(('at least 1', 'at least 2', 'from'))]

def check_settings(settings):
    "UserError for a setting, by the name of its flag, that no run can have; None is not given"
    for k,bound in BOUNDS.items():
        try: ok = (v := settings.get(k)) is None or (WITHIN[bound](v) and not (k in WHOLE and v != int(v)))
        except TypeError: ok = False # text in place of a number
        if not ok: raise UserError(f'--{k.replace("_", "-").lower()} is {v}: it must be {bound}')

def fitting(s, k):
    """The fit of settings `s` with `k` images or episodes a step: a function of the Learner

    Where several processes make the step larger than k the rate grows by the root of it (docs/runs.md).
    """
    lr = s['lr'] * (effective(k)/k)**0.5
    return lambda learn: getattr(learn, f'fit_{s["schedule"]}')(s['epochs'], lr)

def stage_one(data, s, **kwargs):
    "Learner of the global learner and its fit, for the settings `s` of `STAGE_ONE`"
    dls = category_dls(data, bs=s['bs'], aug=train_augmentation(data.px, s['jitter'], s['augment']), seed=s['seed'])
    return global_learner(dls, s['arch'], rotation=s['rotation'], rotation_from=s['rotation_from'], classifier=s['classifier'],
                          smoothing=s['smoothing'], pretrained=s['pretrained'], opt_func=OPTIMISERS[s['opt']],
                          seed=s['seed'], **kwargs),fitting(s, dls.train.bs)

def stage_two(data, s, student, teacher=None, bank=None, **kwargs):
    """Learner of the meta-learner and its fit, for the settings `s` of a reading

    `student`: the stage-one network to start from, or a timm name to start at random; `teacher`: None trains on episodic
    labels alone (CL+EL); `bank`: the teacher's features of the base images where they are known. An episode has `way` classes
    and `query` queries of each, or as many as there are.
    """
    n_images = np.bincount(data.train.y)
    dls = episodic_dls(data, min(s['way'], len(n_images)), s['shot'], max(1, min(s['query'], n_images.min() - s['shot'])), s['episodes'],
                       s['per_step'],
                       aug=train_augmentation(data.px, s['jitter'], s['augment']), seed=s['seed'])
    distill = None if teacher is None else {k:s[k] for k in DISTILL} | dict(bank=bank)
    learn = meta_learner(dls, student, teacher, s['T'], s['gamma'], s['scale'], s['mean'], opt_func=OPTIMISERS[s['opt']],
                         seed=s['seed'], distill=distill, **kwargs)
    return learn,fitting(s, s['per_step'])
