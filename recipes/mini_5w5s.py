"""GRDD on miniImageNet, 5-way 5-shot (Table 1 of arXiv 2107.05583: 84.3 % with ResNet-12)

    python recipes/mini_5w5s.py --data mini-imagenet/           # images/ beside train.csv, val.csv, test.csv
    python recipes/mini_5w5s.py --demo                        # three minutes on two cores, no download

The defaults are the paper's: ResNet-12 teacher and student, 90 + 15 epochs. `--help` lists every setting.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.experiment import grdd


@call_parse
@delegates(grdd, but=['way', 'shot', 'px'])
def main(out:str='runs/mini_5w5s', **kwargs): # folder for results, histories and weights
    "GRDD on miniImageNet, 5-way 5-shot"
    return grdd(way=5, shot=5, px=84, out=out, **kwargs)
