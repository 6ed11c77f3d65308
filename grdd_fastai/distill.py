"""Distil a large network with weights into a small one, on any data set: the program behind recipes/distill.py."""
import copy
import hashlib
import json
import statistics
import time
from dataclasses import asdict
from functools import partial
from typing import Annotated

import numpy as np
import torch

from .core.device import ieee_float32
from .core.distributed import log, processes, rank_world
from .core.errors import UserError
from .core.storage import output_folder, read_json, write_json
from .data.blocks import plain_dl
from .data.episodes import check_episode
from .fewshot.embed import cached_features, embed
from .fewshot.evaluate import evaluate
from .models.create import check_backbone, features, input_config, seeing
from .models.pretrained import load_network, save_network
from .photos.trust import AUTO
from .runs.checkpoint import Stopped
from .runs.loggers import LogOptions
from .runs.options import ComputeOptions, DataOptions
from .runs.provenance import public_word
from .runs.run import Run, default_out
from .settings import at_least, between, checked, from_flags, positive, with_flags
from .stage_one import StageOne, stage_one
from .stage_two import PRESETS, Preset, get_preset, known_features, stage_two

__all__ = ['distill']


DEMO = dict(teacher='convnet4_256.grdd_cifarfs', two=dict(epochs=2, n_episodes=60, views=2))
CLASSIFIER = AUTO[0] # the default of `FewShotClassifier`


@processes()
@checked
@with_flags(files=DataOptions, two=PRESETS | dict(demo=PRESETS['patient'].but(**DEMO['two'])), compute=ComputeOptions, follow=LogOptions)
def distill(
    teacher:str=None, # a network with weights: a timm name, a folder of a run or of recipes/publish.py, hf-hub:user/name
    student:str='convnet4', # small network, a timm model; it starts from random weights, a name with a tag from the tag's
    px:int=32, # side of the student's images in pixels; the teacher gets them at its own side and normalisation
    unlabeled:bool=False, # ignore the classes of the base images: episodes are drawn from random images, and L_rt is left out
    way:Annotated[int, 'classes per episode of the held-out classes', at_least(2)]=5,
    baseline_epochs:Annotated[int, 'also train the student on labels alone for so many epochs, and compare', at_least(1)]=None,
    files=None, # the given `DataOptions`
    out:str=None, # folder for the network, the history and the result (runs/distill; demo: runs/distill-demo)
    results:str=None, # folder in which a record of the result is written as well, which recipes/report.py reads (none)
    preset:Preset='patient',
    two=None, # the given settings of `StageTwo`
    test_episodes:Annotated[int, 'episodes of the held-out classes', between(1, 10**8)]=10_000,
    compute=None, # the given `ComputeOptions`
    follow=None, # the given `LogOptions`
    demo:bool=False, # small settings, on the embedded data set unless --data is given
    resume:bool=False, # go on with the run in --out; begin it where there is none
    overwrite:bool=False, # delete the run that --out holds, and begin anew
    max_minutes:Annotated[float, 'stop after this many minutes with everything saved, for --resume', positive]=None,
) -> dict:
    """Train a small network to see the relatedness that a large one sees, without a stage one of either

    The novel classes of the data, which neither training nor the choice of the epoch has seen, compare it with its teacher. The folder
    `network` in --out is a timm model (`FewShotClassifier('runs/distill/network')`, `timm.create_model('local-dir:...')`). Returns the
    result. UserError for networks, data or flags that cannot be used.
    """
    teacher = teacher or (DEMO['teacher'] if demo else None)
    if teacher is None: raise UserError('no teacher is given: name a network with weights, such as convnet4_256.grdd_cifarfs')
    files,compute,follow = (from_flags(o(), given) for o,given in ((DataOptions, files), (ComputeOptions, compute), (LogOptions, follow)))
    given_gamma = (two or {}).get('gamma')
    two = from_flags(get_preset(preset).but(**DEMO['two'] if demo else {}), two)
    if results:
        with output_folder(results, '--results'): pass # an error now instead of after the training
    if unlabeled and baseline_epochs: raise UserError('--baseline-epochs trains on labels, and --unlabeled uses none: give one of them')
    if unlabeled and given_gamma: raise UserError('--gamma weighs the labels, and --unlabeled uses none: leave one of them out')
    if unlabeled: two = two.but(gamma=0.)
    check_backbone(student, px)
    if '.' in student: two = two.but(init='cl') # the weights of the tag are the start
    alone = baseline_epochs and StageOne(arch=student, epochs=baseline_epochs, schedule='one_cycle', lr=0.02, opt='muon', bs=128,
                                         head='cosine', rotation=False, smoothing=0.1, jitter=two.jitter, seed=two.seed)
    settings = dict(teacher=teacher, student=student, px=px, way=way, **files.identity(), unlabeled=unlabeled, stage_two=two.values(),
                    baseline=alone.values() if alone else None, test_episodes=test_episodes, **asdict(compute), demo=demo)
    plan = ['student_grdd', *(['student_cl'] if alone else []), 'evaluation']
    episode = dict(n_way=way, k_shot=1, n_query=15)
    with Run(default_out('distill', demo) if out is None else out, settings, resume, max_minutes, plan, overwrite=overwrite,
             loggers=follow.loggers) as run:
        if run.result:
            if results: write_record(results, run, run.result)
            return run.print(run.result)
        try:
            files.warn_of_demo(demo)
            large = load_network(teacher)
            data = files.load(px, demo, two.seed)
            for split in (data.val, data.test): check_episode(split, way, 5, 15)
            run.begin(data, files.cache)
            if unlabeled: data = without_classes(data, two.n_way, two.seed)
            known = partial(known_features, large, data, two, run.cache, not compute.fp32, run.stop_if_due)
            meta = stage_two(data, two, student, large, known, valid=episode, **compute.for_learner())
            small,val = run.train('student_grdd', *meta, student)
            nets = dict(teacher=seeing(large, px, data.stats), student=small)
            if alone: nets['labels'],_ = run.train('student_cl', *stage_one(data, alone, valid=episode, **compute.for_learner()), student)
            scores = accuracies(nets, data, way, test_episodes, run)
            save_network(small, run.out/'network', px, *data.stats)
            log(f"FewShotClassifier({str(run.out/'network')!r}) classifies photos with it")
            costs = {k:cost(net, data.px) for k,net in dict(teacher=large, student=small).items()}
            for k,v in costs.items(): log(f'{k}: ' + ', '.join(f'{n:,} {name.replace("_", " ")}' for name,n in v.items()))
            result = run.finish(dataset=data.name, teacher=teacher, student=student, classifier=CLASSIFIER, val_accuracy=round(val, 3),
                                **scores, costs=costs, seed=two.seed)
            if results: write_record(results, run, result)
            return result
        except Stopped as stop: return run.stopped(stop)


def without_classes(data, n_groups, seed):
    "A copy of a `FewShotData` whose base images have random groups of equal size in place of classes, so that episodes are random images"
    data,train = copy.copy(data),copy.copy(data.train)
    train.y = np.random.default_rng(seed).permutation(np.arange(len(train)) % n_groups)
    train.vocab = [f'group {i}' for i in range(n_groups)]
    data.train = train
    return data

def write_record(folder, run, result):
    "Write a JSON file with the result of a finished run, its settings, command, commit, device and versions"
    if rank_world()[0] != 0: return
    began,about = read_json(run.out/'settings.json'),read_json(run.out/'data.json')
    settings = {k:public_word(v) if k in ('data', 'teacher') and v else v for k,v in began['settings'].items()}
    key = hashlib.sha256(json.dumps([settings, about['fingerprint']], sort_keys=True).encode()).hexdigest()[:6]
    name = f'distill-{result["student"]}-{result["dataset"]}-{key}-s{result["seed"]}.json'
    origin = {k:began[k] for k in ('command', 'commit', 'device', 'torch_threads', 'versions')}
    record = result | origin | dict(experiment='distill', teacher=settings['teacher'], settings=settings,
                                    data=dict(name=about['name'], fingerprint=about['fingerprint']))
    with output_folder(folder, '--results') as folder: write_json(folder/name.replace('_', '-'), record)

def accuracies(nets, data, way, n_episodes, run):
    "Accuracy of each network on the novel classes for one shot and five, and the paired differences of the student from the others"
    scores = {}
    for name,net in nets.items():
        h,y = cached_features(net, data, 'test', stats=data.stats, cache=run.cache) if name == 'teacher' else embed(
            net, plain_dl(data, 'test'), distributed=True)
        for shot in (1, 5):
            e = scores[name, shot] = evaluate(h, y, way, shot, 15, n_episodes, classifier=CLASSIFIER)
            run.log_novel(what=name, shot=shot, classifier=CLASSIFIER, accuracy=e.accuracy, ci95=e.ci95, test_episodes=n_episodes)
            log(f'{name}, {shot}-shot: {e}')
    found = {}
    for (name,shot),e in scores.items():
        found.setdefault(f'accuracy_{name}', {})[f'{shot}-shot'] = dict(accuracy=round(e.accuracy, 3), ci95=round(e.ci95, 3))
        if name == 'student': continue
        d = scores['student', shot] - e
        found.setdefault(f'student_minus_{name}', {})[f'{shot}-shot'] = dict(difference=round(d.mean, 3), ci95=round(d.ci95, 3))
    return found

@torch.no_grad()
def cost(net, px):
    "Measure a network on its device: millions of parameters, side of its images in pixels, images per second"
    side = (getattr(net, 'pretrained_cfg', None) and input_config(net)[0]) or px
    net = net.eval()
    device = next(net.parameters()).device
    x = torch.zeros(32, 3, side, side, device=device)
    times = []
    with ieee_float32():
        for _ in range(6): # the first one warms up
            began = time.perf_counter()
            features(net, x).sum().item() # waits for a GPU
            times.append(time.perf_counter() - began)
    return dict(million_parameters=round(sum(p.numel() for p in net.parameters())/1e6, 3), px=side,
                images_per_second=round(len(x)/statistics.median(times[1:])))
