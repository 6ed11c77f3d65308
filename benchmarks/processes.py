"""Compare the accuracy of training in several processes with training in one, on the same number of images and over several seeds

    python benchmarks/processes.py                              # half an hour on two cores
    python benchmarks/processes.py --out benchmarks/processes.json   # for benchmarks/README.md

The data is the embedded data set, whose accuracy is far from 100 % after so short a training. The accuracy is 5-way 1-shot, on the same
10,000 episodes of the validation classes. Stage one: one process with batches of 50, and two processes with 25 images each. Stage two,
whose episodes are never split: one process with one, two and four episodes per step, which are the steps that one, two and four processes
take. The learning rate is the same, or multiplied by the root of the episodes per step, as the recipes do, or by their number.
"""
import json
import os
import statistics
import subprocess
import sys

import torch
from common import print_line, write
from fastcore.script import call_parse
from scipy.stats import t

from grdd_fastai.core.distributed import processes, rank_world
from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.stage_one import StageOne, stage_one
from grdd_fastai.stage_two import PRESETS, stage_two

BS = 50
RATES = {'same':lambda k: 1., 'root':lambda k: k**0.5, 'size':lambda k: float(k)}


def accuracy(net, data, n_episodes):
    "Accuracy (%) of a network on `n_episodes` episodes of the validation classes"
    return evaluate(*embed(net, plain_dl(data, 'val')), n_episodes=n_episodes, seed=1).accuracy

def first_stage(data, seed, epochs):
    "Train stage one in the processes that have joined, and return its Learner"
    learn,fit = stage_one(data, StageOne(arch='convnet4', epochs=epochs, bs=BS, seed=seed), keep_best=False)
    with learn.distrib_ctx(), learn.no_bar(), learn.no_logging(): fit(learn)
    return learn

def second_stage(data, seed, start, episodes_per_step, factor, episodes):
    "Train stage two from the network `start`, with the learning rate multiplied by `factor`, and return the network"
    best = PRESETS['best']
    s = best.but(epochs=1, n_episodes=episodes, episodes_per_step=episodes_per_step, lr=best.lr*factor, seed=seed)
    learn,fit = stage_two(data, s, start, start, keep_best=False)
    with learn.no_bar(), learn.no_logging(): fit(learn)
    return learn.model

def in_processes(n, seed, epochs, test_episodes):
    "Accuracy (%) of stage one, trained in `n` processes on this machine"
    words = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), __file__,
             '--one', str(seed), '--epochs', str(epochs), '--test-episodes', str(test_episodes)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore'))
    if done.returncode: raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])['accuracy']

def over_seeds(values):
    "Mean over the seeds and half-width of its 95% interval (Student's t), as a dict"
    n = len(values)
    ci95 = t.ppf(.975, n - 1) * statistics.stdev(values) / n**0.5 if n > 1 else float('nan')
    return dict(accuracy=round(statistics.mean(values), 2), ci95=round(float(ci95), 2), seeds=n)

def difference(accuracies, single):
    "Mean of the paired differences from the accuracies `single` of one process, seed by seed, and its 95% interval, as a dict"
    d = over_seeds([a - b for a,b in zip(accuracies, single)])
    return dict(difference=d['accuracy'], ci95_difference=d['ci95'])

@call_parse
def main(
    seeds:int=4, # number of training seeds, from 0 on
    epochs:int=2, # epochs of stage one
    episodes:int=400, # episodes of stage two
    test_episodes:int=10_000, # number of episodes of the validation classes
    one:int=None, # seed of a stage one that is trained alone, in the processes that torchrun started
    out:str=None, # JSON file for the lines with device, versions and commit
):
    "Measure how the number of processes changes the accuracy"
    if one is not None:
        with processes():
            learn = first_stage(few_shot_data('demo'), one, epochs)
            if rank_world()[0] == 0: print(json.dumps(dict(accuracy=accuracy(learn.model.backbone, few_shot_data('demo'), test_episodes))))
        return
    found = {n:[in_processes(n, seed, epochs, test_episodes) for seed in range(seeds)] for n in (1, 2)}
    for n,accuracies in found.items():
        print_line(name='stage one', processes=n, images_each=BS//n, **over_seeds(accuracies), **difference(accuracies, found[1]))
    torch.set_num_threads(1)
    data = few_shot_data('demo')
    starts = [first_stage(data, seed, epochs).model.backbone for seed in range(seeds)]
    for k,rates in {1:['same'], 2:RATES, 4:RATES}.items():
        for rate in rates:
            nets = (second_stage(data, seed, start, k, RATES[rate](k), episodes) for seed,start in enumerate(starts))
            accuracies = [accuracy(net, data, test_episodes) for net in nets]
            if k == 1: single = accuracies
            print_line(name='stage two', episodes_a_step=k, rate=rate, **over_seeds(accuracies), **difference(accuracies, single))
    write(out)
