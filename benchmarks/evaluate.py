"""Time few-shot evaluation against easyfsl on the same features, and the whole evaluation against the network's forward pass

    python benchmarks/evaluate.py                               # four minutes on two cores; needs the dev extra
    python benchmarks/evaluate.py --compare 1000 --out benchmarks/evaluate.json      # for benchmarks/README.md

The comparison runs in one process with one thread, on 256-d features of 20 classes with 600 images each, in 5-way 1-shot episodes with 15
queries per class. easyfsl is used as in its tutorials: its loader and its method, one episode at a time. Ours is `evaluate`, with the
sampling of episodes. The two take turns. A line has the median of their times per episode, and `ratio` is easyfsl's time divided by ours.
Lines without `ratio` are methods that easyfsl does not have, and `evaluation`, which compares ten thousand episodes of 12,000 images with
the forward pass over those images (ConvNet-4, all cores).
"""
import statistics
from functools import partial

import numpy as np
import timm
import torch
from common import easyfsl_loader, medians, print_line, seconds, write
from easyfsl import methods
from easyfsl.datasets import FeaturesDataset
from fastcore.script import call_parse

import grdd_fastai  # noqa: F401
from grdd_fastai.core.device import autocast_dtype, keep_freed_memory
from grdd_fastai.data.episodes import sample_episodes
from grdd_fastai.fewshot.classifiers import CLASSIFIERS
from grdd_fastai.fewshot.evaluate import evaluate

WAY,SHOT,QUERY = 5,1,15
# method -> easyfsl's class, our classifier, its settings for easyfsl's definition, and the number of timed episodes of each of the two
SHARED = dict(
    SimpleShot=(methods.SimpleShot, 'simpleshot_l2n', {}, 300, 3000),
    BDCSPN=(methods.BDCSPN, 'bd_cspn', {}, 300, 3000),
    LaplacianShot=(methods.LaplacianShot, 'laplacian_shot', {}, 200, 2000),
    PTMAP=(methods.PTMAP, 'pt_map', dict(steps=10, normalize=False), 8, 300))
# method that easyfsl does not have -> our classifier and the number of timed episodes
OWN = dict(TIM_GD=('tim_gd', 100), TIM_ADM=('tim_adm', 500))


def made_up(n_classes=20, per_class=600, D=256, seed=0):
    "Features of length one (N, D), in classes that overlap, and the class of each (N)"
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n_classes).repeat_interleave(per_class)
    h = (torch.randn(n_classes, D, generator=g)[y] + 3*torch.randn(len(y), D, generator=g) + 1).relu()
    return torch.nn.functional.normalize(h, dim=1),y

def easyfsls(method, h, y, n):
    "Mean accuracy of `n` episodes, computed as in easyfsl's own evaluation"
    data = FeaturesDataset(y.tolist(), h, [str(c) for c in range(int(y.max())+1)])
    right = 0
    with torch.no_grad():
        for support,support_y,query,query_y,_ in easyfsl_loader(data, WAY, SHOT, QUERY, n):
            method.process_support_set(support, support_y)
            right += (method(query).argmax(1) == query_y).sum().item()
    return right / (n*WAY*QUERY)

def ours(h, y, name, n, **settings):
    "Our `Evaluation` of `n` episodes with the classifier `name`"
    return evaluate(h, y, WAY, SHOT, QUERY, n, classifier=partial(CLASSIFIERS[name], **settings))

def accuracies(method, h, y, name, n, **settings):
    "Accuracies (%) of easyfsl's method and of ours on the same `n` episodes"
    right = [0, 0]
    support_y,query_y = (torch.arange(WAY).repeat_interleave(k) for k in (SHOT, QUERY))
    for support,query in sample_episodes(y, WAY, SHOT, QUERY, n):
        for s,q in zip(torch.as_tensor(support).flatten(1), torch.as_tensor(query).flatten(1)):
            method.process_support_set(h[s], support_y)
            mine = CLASSIFIERS[name](h[s][None], support_y[None], h[q][None], **settings)[0]
            with torch.no_grad(): theirs = method(h[q])
            right = [r + (logits.argmax(1) == query_y).sum().item() for r,logits in zip(right, (theirs, mine))]
    return [100*r/(n*WAY*QUERY) for r in right]

def time_evaluation(repeats, images):
    "Time ten thousand episodes of `images` images against the forward pass of ConvNet-4 over them, on all cores"
    keep_freed_memory()
    net = timm.create_model('convnet4', num_classes=0).eval().to(memory_format=torch.channels_last)
    x = torch.randn(256, 3, 32, 32).to(memory_format=torch.channels_last)
    dtype = autocast_dtype(torch.device('cpu'))
    @torch.no_grad()
    def forward():
        with torch.autocast('cpu', dtype or torch.bfloat16, enabled=dtype is not None):
            for _ in range(images//256): net(x)
    h = torch.rand(images, 64)
    y = torch.as_tensor(np.arange(images)*20//images)
    forward()
    evaluate(h, y, n_episodes=500)
    passes,whole = medians(repeats, forward, lambda: evaluate(h, y))
    print_line(method='evaluation', forward_s=round(passes, 2), episodes_10000_s=round(whole, 2),
        forward_and_episodes_over_forward=round((passes + whole)/passes, 3), threads=torch.get_num_threads())

@call_parse
def main(
    repeats:int=5, # number of times that each measurement is repeated
    images:int=12_000, # number of images of the forward pass
    compare:int=0, # number of episodes on which accuracies are compared too (1000 take six minutes, most of them for PT-MAP)
    out:str=None, # JSON file for the lines with device, versions and commit
):
    "Time evaluation"
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    h,y = made_up()
    for name,(cls,classifier,settings,n_theirs,n_ours) in SHARED.items():
        method = cls(feature_normalization=2)
        easyfsls(method, h, y, 2) # the first calls warm up
        ours(h, y, classifier, 50, **settings)
        times = [(seconds(easyfsls, method, h, y, n_theirs)/n_theirs, seconds(ours, h, y, classifier, n_ours, **settings)/n_ours)
                 for _ in range(repeats)]
        theirs,mine = map(statistics.median, zip(*times))
        if compare:
            right_theirs,right_ours = accuracies(method, h, y, classifier, compare, **settings)
            print_line(method=name, episodes=compare, accuracy_easyfsl=right_theirs, accuracy_ours=right_ours)
        print_line(method=name, ratio=round(theirs/mine, 2), easyfsl_us=round(theirs*1e6, 1), ours_us=round(mine*1e6, 1), repeats=repeats)
    for name,(classifier,n) in OWN.items():
        ours(h, y, classifier, 5)
        per = statistics.median(seconds(ours, h, y, classifier, n)/n for _ in range(repeats))
        print_line(method=name, episodes_per_second=round(1/per, 1), repeats=repeats)

    torch.set_num_threads(cores)
    time_evaluation(repeats, images)
    write(out, 'easyfsl')
