"""Any trained networks on any prepared data set: ways, shots, queries and classifiers in one pass over features that are kept on disk

    python recipes/evaluate_weights.py convnet4.grdd_cifarfs --data cifar-fs.zip --classifiers cosine,logistic,tim_adm
    python recipes/evaluate_weights.py runs/a/student_grdd runs/b/student_grdd --data my-data/ --split val --shots 1

A network is a timm name, a folder of recipes/publish.py, the folder of a training or weights of a run. The table goes to the screen and
to --out as CSV and JSON; each network is compared with the first, paired on the same episodes. Scorings of the novel classes are logged.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.scoring import score_networks


@call_parse
@delegates(score_networks)
def main(
    *networks:str, # timm names with weights, folders of recipes/publish.py or of trainings, or weights of runs
    **kwargs
):
    "Score networks with classifiers on few-shot episodes"
    score_networks(*networks, **kwargs)
