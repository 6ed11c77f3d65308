"""Time training episodes of another few-shot library, easyfsl, against ours

    python benchmarks/peers.py                                  # a minute on two cores; needs the dev extra
    python benchmarks/peers.py --out benchmarks/peers.json      # for benchmarks/README.md

The episodes are 5-way 1-shot with 15 queries per class, of 32 px images that are cropped, jittered and flipped. One line times their
loading, and one times a training step of ConvNet-4 on their labels with the loading (easyfsl: prototypes; ours: cosines, CL+EL). easyfsl is
used as in its tutorials: EasySet reads the images from a folder, with torchvision's transforms and easyfsl's sampler. The two take turns in
one process. Times are medians, and `times` is easyfsl's time divided by ours. Other libraries cannot be installed here: learn2learn 0.2.0
does not build on Python 3.11, torchmeta 1.8.0 needs torch below 1.10, and mmfewshot 0.1.0 needs mmcv below 2. evaluate.py compares the
classifiers.
"""
import json
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from common import MadeUp, easyfsl_loader, medians, print_line, write
from easyfsl.datasets import EasySet
from easyfsl.methods import PrototypicalNetworks
from fastcore.script import call_parse
from PIL import Image
from torchvision import transforms as T

from grdd_fastai.data.blocks import episodic_dls
from grdd_fastai.models.create import create_backbone
from grdd_fastai.stage_two import meta_learner

EPISODE = 5,1,15
PX = 32


def easy_set(data, folder):
    "EasySet of the base images, which are written to `folder` as PNGs in class folders with a JSON file that names the folders"
    for i,(image,c) in enumerate(zip(data.train.images, data.train.y)):
        (folder/data.train.vocab[c]).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder/data.train.vocab[c]/f'{i}.png')
    specs = dict(class_names=data.train.vocab, class_roots=[str(folder/c) for c in data.train.vocab])
    (folder/'specs.json').write_text(json.dumps(specs))
    augment = [T.RandomCrop(PX, padding=4), T.ColorJitter(.4, .4, .4), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(*data.stats)]
    return EasySet(folder/'specs.json', transform=T.Compose(augment))

def prototype_steps(loader):
    "A function that trains easyfsl's prototypical network on the loader's episodes"
    net = create_backbone('convnet4', 0, PX).train()
    method = PrototypicalNetworks(net)
    opt = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)
    def steps():
        for support,support_y,query,query_y,_ in loader:
            opt.zero_grad()
            method.process_support_set(support, support_y)
            F.cross_entropy(method(query), query_y).backward()
            opt.step()
    return steps

@call_parse
def main(
    repeats:int=5, # number of times that each measurement is repeated
    episodes:int=20, # number of episodes per measurement
    out:str=None, # JSON file for the lines with device, versions and commit
):
    "Time other libraries"
    data = MadeUp(PX, 64*60)
    def line(name, theirs, ours):
        theirs() # the first calls warm up
        ours()
        peer,own = medians(repeats, theirs, ours)
        print_line(name=name, peer='easyfsl', peer_ms=round(1e3*peer/episodes, 2), ours_ms=round(1e3*own/episodes, 2),
                   times=round(peer/own, 1), repeats=repeats)
    with tempfile.TemporaryDirectory() as folder:
        loader = easyfsl_loader(easy_set(data, Path(folder)), *EPISODE, episodes)
        dls = episodic_dls(data, *EPISODE, n_episodes=episodes)
        line('episode loaded', lambda: [0 for _ in loader], lambda: [0 for _ in dls.train])
        theirs = prototype_steps(loader)
        learn = meta_learner(dls, create_backbone('convnet4', 0, PX), valid=dict(n_episodes=1), keep_best=False)
        learn.remove_cb(learn.few_shot_accuracy)
        def ours():
            with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        line('training step with loading', theirs, ours)
    write(out, 'easyfsl')
