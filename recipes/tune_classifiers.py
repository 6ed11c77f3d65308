"""Choose the settings of few-shot classifiers for a trained network on the validation classes

    python recipes/tune_classifiers.py convnet4.grdd_cifarfs --data cifar-fs.zip --classifiers tim_adm,pt_map --mirror

The published settings of a classifier belong to the network of its paper. Here one setting after the other is halved, doubled, and so on,
on 2,000 episodes of the validation classes. Each number of shots gets its own settings. The program prints what it chose, and the command
that scores the choice on the novel classes.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.experiments.tuning import tune_classifiers
from grdd_fastai.settings import exact_flags


@call_parse
@exact_flags
@delegates(tune_classifiers)
def main(
    network:str, # network: a timm name with weights, a folder of a run or of recipes/publish.py, or a weights file of a run
    **kwargs
):
    "Choose the settings of classifiers on the validation classes"
    tune_classifiers(network, **kwargs)
