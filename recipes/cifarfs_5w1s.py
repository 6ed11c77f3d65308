"""GRDD on CIFAR-FS, 5-way 1-shot (Table 1 of arXiv 2107.05583: 77.5 % with ResNet-12)

    python recipes/cifarfs_5w1s.py                              # downloads CIFAR-FS
    python recipes/cifarfs_5w1s.py --data cifar-fs.zip          # or your own data set: data/README.md
    python recipes/cifarfs_5w1s.py --demo                       # three minutes on two cores, no download

The defaults are the paper's ResNet-12 teacher and student, its 90 + 15 epochs, and the settings of stage two that did best on the
validation classes. `--preset paper` sets stage two as the paper describes it. `--help` lists every setting.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.grdd import grdd
from grdd_fastai.settings import exact_flags


@call_parse
@exact_flags
@delegates(grdd, but=['way', 'shot', 'px', 'name'])
def main(**kwargs):
    "GRDD on CIFAR-FS, 5-way 1-shot"
    return grdd(way=5, shot=1, px=32, name='cifarfs_5w1s', **kwargs)
