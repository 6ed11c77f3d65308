"""GRDD on CIFAR-FS, 5-way 1-shot (Table 1 of arXiv 2107.05583: 77.5 % with ResNet-12)

    python recipes/cifarfs_5w1s.py                              # fetches CIFAR-FS
    python recipes/cifarfs_5w1s.py --data cifar-fs.zip          # or any data set of yours: data/README.md
    python recipes/cifarfs_5w1s.py --demo                        # three minutes on two cores, no download

The defaults are the paper's ResNet-12 teacher and student and 90 + 15 epochs, with stage two as it did best on validation classes;
`--preset paper` takes the paper's words for it. `--help` lists every setting.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.grdd import grdd


@call_parse
@delegates(grdd, but=['way', 'shot', 'px', 'name'])
def main(**kwargs):
    "GRDD on CIFAR-FS, 5-way 1-shot"
    return grdd(way=5, shot=1, px=32, name='cifarfs_5w1s', **kwargs)
