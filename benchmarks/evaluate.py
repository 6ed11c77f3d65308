"""Few-shot evaluation timed against easyfsl on the same cached features, and the whole evaluation against the network's forward pass

    python benchmarks/evaluate.py                               # four minutes on two cores; needs the dev extra
    python benchmarks/evaluate.py --compare 1000 --out benchmarks/evaluate.json      # what README.md here shows

One process, one thread, 256-d features of 20 classes x 600, 5-way 1-shot, 15 queries. easyfsl is timed as one uses it: its loader and
its method, an episode at a time; ours as `evaluate`, sampling included. The two take turns; a line has the medians of their times for
an episode and `ratio`, theirs / ours. Lines without `ratio`: methods easyfsl has not, and `evaluation`, ten thousand episodes of 12,000
images against the forward pass over those images (ConvNet-4, all cores).
"""
import statistics
from functools import partial

import numpy as np
import timm
import torch
from common import easyfsl_loader, say, seconds, write
from easyfsl import methods
from easyfsl.datasets import FeaturesDataset
from fastcore.script import call_parse

import grdd_fastai  # noqa: F401
from grdd_fastai.core.device import autocast_dtype, keep_freed_memory
from grdd_fastai.data.episodes import sample_episodes
from grdd_fastai.fewshot.classifiers import CLASSIFIERS
from grdd_fastai.fewshot.evaluate import evaluate

WAY,SHOT,QUERY = 5,1,15
# method -> easyfsl's class, our classifier, with easyfsl's definitions where it has settings for them, episodes timed of each
SHARED = dict(
    SimpleShot=(methods.SimpleShot, 'simpleshot_l2n', {}, 300, 3000),
    BDCSPN=(methods.BDCSPN, 'bd_cspn', {}, 300, 3000),
    LaplacianShot=(methods.LaplacianShot, 'laplacian_shot', {}, 200, 2000),
    PTMAP=(methods.PTMAP, 'pt_map', dict(steps=10, normalize=False), 8, 300))
OWN = dict(TIM_GD=('tim_gd', 100), TIM_ADM=('tim_adm', 500))


def made_up(n_classes=20, per_class=600, D=256, seed=0):
    "Unit features of classes that overlap, and the classes"
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n_classes).repeat_interleave(per_class)
    h = (torch.randn(n_classes, D, generator=g)[y] + 3*torch.randn(len(y), D, generator=g) + 1).relu()
    return torch.nn.functional.normalize(h, dim=1),y

def easyfsls(method, h, y, n):
    "Mean accuracy of `n` episodes, the way easyfsl's own evaluation goes through them"
    data = FeaturesDataset(y.tolist(), h, [str(c) for c in range(int(y.max())+1)])
    right = 0
    with torch.no_grad():
        for support,support_y,query,query_y,_ in easyfsl_loader(data, WAY, SHOT, QUERY, n):
            method.process_support_set(support, support_y)
            right += (method(query).argmax(1) == query_y).sum().item()
    return right / (n*WAY*QUERY)

def ours(h, y, name, n, **settings): return evaluate(h, y, WAY, SHOT, QUERY, n, classifier=partial(CLASSIFIERS[name], **settings))

def accuracies(method, h, y, name, n, **settings):
    "Of easyfsl's method and ours on the very same `n` episodes"
    right = [0, 0]
    support_y,query_y = (torch.arange(WAY).repeat_interleave(k) for k in (SHOT, QUERY))
    for support,query in sample_episodes(y, WAY, SHOT, QUERY, n):
        for s,q in zip(torch.as_tensor(support).flatten(1), torch.as_tensor(query).flatten(1)):
            method.process_support_set(h[s], support_y)
            mine = CLASSIFIERS[name](h[s][None], support_y[None], h[q][None], **settings)[0]
            with torch.no_grad(): right = [r + (logits.argmax(1) == query_y).sum().item() for r,logits in zip(right, (method(h[q]), mine))]
    return [100*r/(n*WAY*QUERY) for r in right]

@call_parse
def main(
    repeats:int=5, # of each measurement, taken in turns
    images:int=12_000, # of the forward pass
    compare:int=0, # episodes on which accuracies are compared as well (1000 take six minutes, PT-MAP's nearly all of them)
    out:str=None, # file that takes the lines with hardware, versions and commit, as JSON
):
    "Time evaluation"
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    h,y = made_up()
    for name,(cls,classifier,settings,n_theirs,n_ours) in SHARED.items():
        method = cls(feature_normalization=2)
        easyfsls(method, h, y, 2), ours(h, y, classifier, 50, **settings)
        times = [(seconds(easyfsls, method, h, y, n_theirs)/n_theirs, seconds(ours, h, y, classifier, n_ours, **settings)/n_ours)
                 for _ in range(repeats)]
        theirs,mine = map(statistics.median, zip(*times))
        if compare:
            say(method=name, episodes=compare,
                **dict(zip(('accuracy_easyfsl','accuracy_ours'), accuracies(method, h, y, classifier, compare, **settings))))
        say(method=name, ratio=round(theirs/mine, 2), easyfsl_us=round(theirs*1e6, 1), ours_us=round(mine*1e6, 1), repeats=repeats)
    for name,(classifier,n) in OWN.items():
        ours(h, y, classifier, 5)
        per = statistics.median(seconds(ours, h, y, classifier, n)/n for _ in range(repeats))
        say(method=name, episodes_per_second=round(1/per, 1), repeats=repeats)

    torch.set_num_threads(cores)
    keep_freed_memory()
    net,x = (timm.create_model('convnet4', num_classes=0).eval().to(memory_format=torch.channels_last),
             torch.randn(256, 3, 32, 32).to(memory_format=torch.channels_last))
    dtype = autocast_dtype(torch.device('cpu'))
    @torch.no_grad()
    def forward():
        with torch.autocast('cpu', dtype or torch.bfloat16, enabled=dtype is not None):
            for _ in range(images//256): net(x)
    h,y = torch.rand(images, 64),torch.as_tensor(np.arange(images)*20//images)
    forward(), evaluate(h, y, n_episodes=500)
    passes,whole = zip(*[(seconds(forward), seconds(evaluate, h, y)) for _ in range(repeats)])
    passes,whole = statistics.median(passes),statistics.median(whole)
    say(method='evaluation', forward_s=round(passes, 2), episodes_10000_s=round(whole, 2),
        forward_and_episodes_over_forward=round((passes + whole)/passes, 3), threads=cores)
    write(out, 'easyfsl')
