"""Make a small network of one's own from a large one with weights, on one's own photos

    python recipes/distill.py --data my-photos/ --teacher vit_small_patch14_dinov2.lvd142m --student mobilenetv4_conv_small --px 96
    python recipes/distill.py --data my-photos/ --teacher convnet4_256.grdd_cifarfs --unlabeled
    python recipes/distill.py --demo                            # a minute on two cores, no download

The small network learns to see how related the large one finds the photos (GRDD's stage two); neither needs a stage one. It is written to
`network/` in --out, which FewShotClassifier takes, and is compared with its teacher on the novel classes: accuracy, speed and size.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.distill import distill
from grdd_fastai.settings import exact_flags


@call_parse
@exact_flags
@delegates(distill)
def main(**kwargs):
    "From a large network to a small one of one's own"
    return distill(**kwargs)
