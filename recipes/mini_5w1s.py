"""GRDD on miniImageNet, 5-way 1-shot (Table 1 of arXiv 2107.05583: 67.5 % with ResNet-12)

    python recipes/mini_5w1s.py --data mini-imagenet/           # a folder with images/, train.csv, val.csv and test.csv
    python recipes/mini_5w1s.py --demo                          # three minutes on two cores, no download

The defaults are the paper's ResNet-12 teacher and student, its 90 + 15 epochs, and the settings of stage two that did best on the
validation classes. `--preset paper` sets stage two as the paper describes it. `--help` lists every setting.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.core.errors import UserError
from grdd_fastai.grdd import grdd
from grdd_fastai.settings import exact_flags


@call_parse
@exact_flags
@delegates(grdd, but=['way', 'shot', 'px', 'name'])
def main(
    data:str=None, # folder with images/, train.csv, val.csv and test.csv, or any other layout of data/README.md
    demo:bool=False, # small settings, and the embedded data set unless --data is given
    **kwargs
):
    "GRDD on miniImageNet, 5-way 1-shot"
    if data is None and not demo: raise UserError('miniImageNet cannot be fetched: give --data its folder, or --demo')
    return grdd(way=5, shot=1, px=84, name='mini_5w1s', data=data, demo=demo, **kwargs)
