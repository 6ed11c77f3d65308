"""How true is what a FewShotClassifier says of itself: expected accuracy, probabilities, unknown photos

    python recipes/trust.py convnet4.grdd_cifarfs --data cifar-fs.zip --score novel
    python recipes/trust.py my-network/ --data my-data/ --ways 3 --shots 10

Supports of random classes and photos are drawn, and each is asked for the accuracy to expect, for probabilities and for unknown photos. The
table compares the answers with many new photos of the same classes and of others.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.experiments.trust import measure_trust
from grdd_fastai.settings import exact_flags


@call_parse
@exact_flags
@delegates(measure_trust)
def main(
    network:str, # a timm name with weights, a folder of a run or of recipes/publish.py, or a weights file of a run
    **kwargs
):
    "Measure what a few photos say of their own classifier"
    measure_trust(network, **kwargs)
