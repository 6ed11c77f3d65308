"""Any trained networks on any prepared data set: ways, shots, queries and classifiers in one pass over features that are kept on disk

    python recipes/evaluate_weights.py convnet4.grdd_cifarfs --data cifar-fs.zip --score novel --classifiers cosine,logistic,tim_adm
    python recipes/evaluate_weights.py runs/a runs/b --data my-data/ --shots 1

A network is a timm name, a folder of recipes/publish.py, the folder of a run or weights of one. The table goes to the screen and
to --out as CSV and JSON; each network is compared with the first, paired on the same episodes. Scorings of the novel classes are logged.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.experiments.score import score_networks


@call_parse
@delegates(score_networks)
def main(
    *networks:str, # timm names with weights, folders of runs or of recipes/publish.py, or weights of runs
    **kwargs
):
    "Score networks with classifiers on few-shot episodes"
    score_networks(*networks, **kwargs)
