"""Compare weights of each term that a student learns from a teacher by, so that no term is behind for its weight alone

    python recipes/term_weights.py --data cifar-fs.zip --teacher weights/resnet12_320.grdd_cifarfs --images 115200
    python recipes/term_weights.py --demo --methods kd,kd_x4    # three networks, two minutes on two cores, no download

A row is a method of recipes/compare.py with its weight, or with a multiple of it: kd_x4 has four times the weight of kd.
"""
from dataclasses import replace

from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.experiments.comparison import TWO, compare_methods
from grdd_fastai.methods.catalogue import METHODS
from grdd_fastai.settings import exact_flags

TERMS = dict(grdd='kl_weight', kd='kd_weight', fitnet='regression_weight', crd='crd_weight', rkd='rkd_weight',
             similarity='similarity_weight', dkd='dkd_weight', dist='dist_weight') # method -> the setting that is its weight
FACTORS = (1/16, 1/4, 1, 4, 16)

def row(name, setting, factor):
    method = METHODS[name]
    usual = method.settings.get(setting, TWO.distill.kl_weight)
    return replace(method, title=f'{method.title}, weight {usual*factor:g}', settings=dict(method.settings) | {setting:usual*factor})

ROWS = {name + ('' if factor == 1 else f'_x{factor:g}'):row(name, setting, factor) for name,setting in TERMS.items() for factor in FACTORS}

@call_parse
@exact_flags
@delegates(compare_methods, but=['known'])
def main(
    methods:str='all', # rows, separated by commas, or all
    **kwargs
):
    "Which weight suits each term"
    compare_methods(methods, known=ROWS, **kwargs)
