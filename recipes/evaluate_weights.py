"""Score any trained networks on any data set, for several ways, shots, queries and classifiers at once

    python recipes/evaluate_weights.py convnet4.grdd_cifarfs --data cifar-fs.zip --score novel --classifiers cosine,logistic,tim_adm
    python recipes/evaluate_weights.py runs/a runs/b --data my-data/ --shots 1

A network is a timm name, a folder of recipes/publish.py, the folder of a run, or a weights file of a run. Its features are computed once
and kept on disk. The table is printed and written to --out as CSV and JSON. Each network is compared with the first one on the same
episodes. Scorings of the novel classes are logged.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.experiments.score import score_networks
from grdd_fastai.settings import exact_flags


@call_parse
@exact_flags
@delegates(score_networks)
def main(
    *networks:str, # networks: timm names with weights, folders of runs or of recipes/publish.py, or weights files of runs
    **kwargs
):
    "Score networks with classifiers on few-shot episodes"
    score_networks(*networks, **kwargs)
