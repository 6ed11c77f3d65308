"""Compare weights of each term by which a student learns from a teacher, so that no term is behind for its weight alone

    python recipes/term_weights.py --data cifar-fs.zip --teacher weights/resnet12_320.grdd_cifarfs --images 115200
    python recipes/term_weights.py --demo --methods kd_5,kd_20 --versus kd_5        # two networks, one minute on two cores, no download

A row is a method of recipes/compare.py with another weight: kd_20 is `kd` with a weight of 20. A row such as grdd_20_fitnet_20 has two
terms.
"""
from dataclasses import replace

from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.experiments.comparison import compare_methods
from grdd_fastai.methods.catalogue import METHODS
from grdd_fastai.settings import exact_flags

WEIGHTS = { # method -> the setting that is its weight, and the weights that are compared
    'grdd':       ('kl_weight', (1.25, 5., 20., 80.)),
    'kd':         ('kd_weight', (1.25, 5., 20.)),
    'fitnet':     ('regression_weight', (1.25, 5., 20., 80.)),
    'crd':        ('crd_weight', (.25, 1., 4.)),
    'rkd':        ('rkd_weight', (.78125, 3.125, 12.5, 50.)),
    'similarity': ('similarity_weight', (750., 3000., 12000.)),
    'dkd':        ('dkd_weight', (.25, 1., 4.)),
    'dist':       ('dist_weight', (1.25, 5., 20.)),
}

def row(title, name, **weights): return replace(METHODS[name], title=title, settings=dict(METHODS[name].settings) | weights)

ROWS = {f'{name}_{weight:g}':row(f'{METHODS[name].title}, weight {weight:g}', name, **{setting:weight})
        for name,(setting,weights) in WEIGHTS.items() for weight in weights}
ROWS |= {f'grdd_{weight:g}_fitnet_{other:g}':row(f'GRDD and features, weights {weight:g} and {other:g}', 'grdd', kl_weight=weight,
                                               regression_weight=other) for weight in (5., 20., 80.) for other in (5., 20.)}

@call_parse
@exact_flags
@delegates(compare_methods, but=['known', 'name'])
def main(
    methods:str='all', # rows, separated by commas, or all
    **kwargs
):
    "Which weight suits each term"
    compare_methods(methods, known=ROWS, name='term_weights', **kwargs)
