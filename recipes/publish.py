"""Score the network of a finished training and write it as a folder that timm loads, with a model card

    python recipes/publish.py runs/experiments/gr-convnet4-s0-1234abcd --data cifar-fs.zip --out weights/convnet4.grdd_cifarfs

`timm.create_model('local-dir:weights/convnet4.grdd_cifarfs')` loads the network. `--hub user/name` also pushes it to the Hugging Face
hub, from which `timm.create_model('hf-hub:user/name')` loads it.
"""
from fastcore.script import call_parse

from grdd_fastai.core.distributed import log
from grdd_fastai.core.storage import user_path
from grdd_fastai.experiments.publish import load_trained, measured, publish
from grdd_fastai.experiments.store import SPLITS, NetworkStore
from grdd_fastai.experiments.table import check_writable, whole_numbers
from grdd_fastai.runs.options import DataOptions
from grdd_fastai.settings import exact_flags, from_flags, with_flags


@call_parse
@exact_flags
@with_flags(files=DataOptions)
def main(
    run:str, # folder of the training with net.safetensors and net.json, as recipes/table2.py writes it
    out:str=None, # folder to write, whose name is the name of the weights in timm's form arch.tag (published/ in the run's folder)
    files=None, # the given `DataOptions`
    shots:str='1,5', # shots to score, separated by commas
    test_episodes:int=10_000, # number of episodes to score, both of the validation and of the novel classes
    results:str=None, # second folder for the log of the scorings of the novel classes (in this project: results)
    hub:str=None, # also push to this Hugging Face repository: user/name
):
    "Score a trained network and write it as a folder that timm loads"
    check_writable(out or user_path(run)/'published', results)
    px = load_trained(run).read('net.json')['px']
    data = from_flags(DataOptions(), files).load(px)
    trained = load_trained(run, data.fingerprint)
    store = NetworkStore(data, trained.folder.parent, logs=[trained.folder.parent, *([results] if results else [])])
    scores = {(split, shot):store.score(trained, split, shot, test_episodes) for split in SPLITS for shot in whole_numbers('shots', shots)}
    for (split,shot),e in scores.items(): log(f'{split}, {shot}-shot: {e}')
    folder = publish(trained.net, measured(trained, scores), out or trained.folder/'published', n_base=len(data.train), hub=hub)
    log(f"timm.create_model('local-dir:{folder}') loads it")
