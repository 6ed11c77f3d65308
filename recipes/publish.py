"""A finished training's network, scored and written as a folder that timm loads, with a model card

    python recipes/publish.py runs/experiments/gr-convnet4-s0-1234abcd --data cifar-fs.zip --out weights/convnet4.grdd_cifarfs

`timm.create_model('local-dir:weights/convnet4.grdd_cifarfs')` loads it; with `--hub user/name` it is pushed to the Hugging Face
hub as well, for `timm.create_model('hf-hub:user/name')`.
"""
from fastcore.script import call_parse

from grdd_fastai.core.distributed import log
from grdd_fastai.core.storage import user_path
from grdd_fastai.experiments.publish import load_trained, measured, publish
from grdd_fastai.experiments.store import SPLITS, NetworkStore
from grdd_fastai.experiments.table import numbers, writable
from grdd_fastai.runs.options import DataOptions
from grdd_fastai.settings import from_flags, with_flags


@call_parse
@with_flags(files=DataOptions)
def main(
    run:str, # folder of the training: net.safetensors and net.json in it, as recipes/table2.py leaves them
    out:str=None, # folder to write; its name is the weights', as timm spells it: arch.tag (none: published/ in the run's)
    files=None, # the given `DataOptions`
    shots:str='1,5', # shots to score, separated by commas
    test_episodes:int=10_000, # to score, of the validation and of the novel classes
    results:str=None, # folder whose log of every scoring of the novel classes takes these (the project's own: results)
    hub:str=None, # also push to this Hugging Face repository: user/name
):
    "Score a trained network and write it as a folder that timm loads"
    writable(out or user_path(run)/'published', results)
    px = load_trained(run).read('net.json')['px']
    data = from_flags(DataOptions(), files).load(px)
    trained = load_trained(run, data.fingerprint)
    store = NetworkStore(data, trained.folder.parent, logs=[trained.folder.parent, *([results] if results else [])])
    scores = {(split, shot):store.score(trained, split, shot, test_episodes) for split in SPLITS for shot in numbers('shots', shots)}
    for (split,shot),e in scores.items(): log(f'{split}, {shot}-shot: {e}')
    folder = publish(trained.net, measured(trained, scores), out or trained.folder/'published', n_base=len(data.train), hub=hub)
    log(f"timm.create_model('local-dir:{folder}') loads it")
