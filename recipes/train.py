"""GRDD on any data set, at any size, way and shot; the recipes named after a benchmark are this one with its numbers

    python recipes/train.py --data my-data/ --px 64 --way 5 --shot 3 --teacher resnet12 --student convnet4
    python recipes/train.py --data my-data/ --px 96 --student resnet18.a1_in1k --teacher resnet50.a1_in1k --no-rotation

`--data` takes the layouts of data/README.md. `--help` lists every setting.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.grdd import grdd
from grdd_fastai.settings import exact_flags


@call_parse
@exact_flags
@delegates(grdd, but=['name'])
def main(**kwargs):
    "GRDD on any data set"
    return grdd(name='train', **kwargs)
