"""A finished training's network, scored and written as a folder that timm loads, with a model card

    python recipes/publish.py runs/experiments/gr-convnet4-s0-1234abcd --data cifar-fs.zip --out weights/convnet4.grdd_cifarfs

`timm.create_model('local-dir:weights/convnet4.grdd_cifarfs')` loads it; with `--hub user/name` it is pushed to the Hugging Face
hub as well, for `timm.create_model('hf-hub:user/name')`.
"""
from fastcore.script import call_parse

from grdd_fastai.core.distributed import say
from grdd_fastai.core.storage import user_path
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.experiments.publish import load_trained, measured, publish
from grdd_fastai.experiments.store import SPLITS, Study
from grdd_fastai.experiments.table import numbers, writable


@call_parse
def main(
    run:str, # folder of the training: net.safetensors and net.json in it, as recipes/table2.py leaves them
    out:str=None, # folder to write; its name is the weights', as timm spells it: arch.tag (none: published/ in the run's)
    data:str=None, # raw data set in any layout of data/README.md (none: fetch CIFAR-FS)
    shots:str='1,5', # shots to score, separated by commas
    test_episodes:int=10_000, # to score, of the validation and of the novel classes
    results:str=None, # folder whose log of every scoring of the novel classes takes these (the project's own: results)
    hub:str=None, # also push to this Hugging Face repository: user/name
    cache:str=None, # folder for decoded images (none: ~/.cache/grdd_fastai)
    allow_large:bool=False, # also decode photos of 90 to 179 megapixels
):
    "Score a trained network and write it as a folder that timm loads"
    writable(out or user_path(run)/'published', results)
    px = load_trained(run).read('net.json')['px']
    data = few_shot_data(data, px, cache, allow_large=allow_large)
    trained = load_trained(run, data.fingerprint)
    study = Study(data, trained.folder.parent, logs=[trained.folder.parent, *([results] if results else [])])
    scores = {(split, shot):study.score(trained, split, shot, test_episodes) for split in SPLITS for shot in numbers('shots', shots)}
    for (split,shot),e in scores.items(): say(f'{split}, {shot}-shot: {e}')
    folder = publish(trained.net, measured(trained, scores), out or trained.folder/'published', n_base=len(data.train), hub=hub)
    say(f"timm.create_model('local-dir:{folder}') loads it")
