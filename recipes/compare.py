"""Compare methods: train each for equally many images, and score all on the same episodes

    python recipes/compare.py --methods protonet,rfs_simple,skd0,grdd --data cifar-fs.zip --teacher weights/resnet12_320.grdd_cifarfs
    python recipes/compare.py --demo                            # four methods, two minutes on two cores, no download

Tables, paired differences and a figure of accuracy against cost are written to --out, one of each for every protocol. Each network is
trained once, several processes may share the folder, and the same command goes on where it was stopped. The methods are the lines of
`METHODS` in grdd_fastai/methods/catalogue.py.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.experiments.comparison import compare_methods
from grdd_fastai.settings import exact_flags


@call_parse
@exact_flags
@delegates(compare_methods, but=['known', 'name'])
def main(**kwargs):
    "Compare methods of few-shot learning"
    compare_methods(**kwargs)
