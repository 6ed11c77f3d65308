"""GRDD on miniImageNet, 5-way 5-shot (Table 1 of arXiv 2107.05583: 84.3 % with ResNet-12)

    python recipes/mini_5w5s.py --data mini-imagenet/           # images/ beside train.csv, val.csv, test.csv
    python recipes/mini_5w5s.py --demo                        # three minutes on two cores, no download

The defaults are the paper's ResNet-12 teacher and student and 90 + 15 epochs, with stage two as it did best on validation classes;
`--preset paper` takes the paper's words for it. `--help` lists every setting.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.core.errors import UserError
from grdd_fastai.grdd import grdd


@call_parse
@delegates(grdd, but=['way', 'shot', 'px', 'name'])
def main(
    data:str=None, # images/ beside train.csv, val.csv, test.csv, or any layout of data/README.md
    demo:bool=False, # small settings, and the embedded data set unless --data is given
    **kwargs
):
    "GRDD on miniImageNet, 5-way 5-shot"
    if data is None and not demo: raise UserError('miniImageNet cannot be fetched: give --data its folder, or --demo')
    return grdd(way=5, shot=5, px=84, name='mini_5w5s', data=data, demo=demo, **kwargs)
