"""Time the training step of the recipes against a step of the bare network, to see what all work around the network costs

    python benchmarks/train_step.py                             # four minutes on two cores
    python benchmarks/train_step.py --out benchmarks/train_step.json      # for benchmarks/README.md

The recipe's step is a step of `fit` in stage one with rotation, or in stage two with known features of the teacher: loading, augmentation,
rotation or episodes, loss, optimiser and all callbacks. The bare step is the forward pass, cross-entropy, backward pass and SGD step of the
network alone, on one batch of the same shape that stays on the device, in the same precision and memory format. The networks are ConvNet-4
and ResNet-12, at 32 and 84 px. The two steps take turns in one process. A line has the medians of their times, and `ratio` is the bare time
divided by the recipe's: 1 means that a step costs no more than the network's arithmetic. A batch is the recipe's (64 images at four
rotations, or 20-way 1-shot with 6 queries per class), halved until a bare step takes less than `--step` seconds.

A line `teacher` compares the step of stage two with known features of clean images, with those of 20 views, and with the teacher's forward
pass on each batch; teacher and student have the same architecture. The last line compares stage one of ConvNet-4 at 32 px with plain
fastai: one image after the other through albumentations, float32, contiguous memory, and the blocks as papers write them. Plain fastai
runs in its own process and takes turns too.
"""
import multiprocessing
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from common import MadeUp, print_line, wait, write
from fastai.callback.core import Callback, CancelFitException
from fastai.torch_core import default_device
from fastcore.script import call_parse
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from grdd_fastai.core.device import amp, autocast_dtype
from grdd_fastai.fewshot.embed import ViewFeatures
from grdd_fastai.models.create import create_backbone
from grdd_fastai.stage_one import StageOne, stage_one
from grdd_fastai.stage_two import PRESETS, stage_two

N_CLASSES = 64
ONE = StageOne(bs=64, epochs=1, schedule='one_cycle', lr=0.01)
TWO = PRESETS['best'].but(epochs=1, lr=1e-3)


class Turns(Callback):
    """Time a few steps of the fit and a few of `other` in turns of about `least` seconds; the fit ends after `repeats` turns of each

    All turns are of one epoch. Where its steps are fast and few, the turns are shorter.
    """
    order = 1000
    run_valid = False
    def __init__(self, other, repeats, least=1.):
        self.other = other
        self.repeats = repeats
        self.least = least
    def before_fit(self):
        self.mine,self.others = [],[] # seconds per step of each turn
        self.steps = 0
        self.turn = None # steps per turn
        self.begun = None
    def after_batch(self):
        now = wait(torch.device(self.dls.device))
        self.steps += 1
        if self.iter < 2: self.begun = now # the first steps warm up
        elif self.turn is None: # the third step decides how many steps a turn has
            self.turn = max(1, min(round(self.least/(now - self.begun)), (self.n_iter - 3)//self.repeats))
            self.other(self.turn)
            self.steps = 0
            self.begun = wait(torch.device(self.dls.device))
        elif self.steps == self.turn:
            self.mine.append((now - self.begun)/self.turn)
            self.others.append(self.other(self.turn))
            if len(self.mine) == self.repeats: raise CancelFitException()
            self.steps = 0
            self.begun = wait(torch.device(self.dls.device))


def bare(arch, px, n_images, device, compile=False):
    "A function of k that makes k steps of the network alone and returns the seconds per step"
    net = create_backbone(arch, N_CLASSES, px).to(device, memory_format=torch.channels_last).train()
    dtype = autocast_dtype(device)
    if compile:
        for part in net.children(): part.compile()
    opt = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    x = torch.randn(n_images, 3, px, px, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(0, N_CLASSES, (n_images,), device=device)
    def steps(k):
        begun = wait(device)
        for _ in range(k):
            with amp(device, dtype): p = net(x)
            F.cross_entropy(p.float(), y).backward()
            opt.step()
            opt.zero_grad()
        return (wait(device) - begun)/k
    return steps


def gflop_per_image(arch, px):
    "Counted floating-point operations of a forward and a backward pass, in 1e9 per image"
    net = create_backbone(arch, N_CLASSES, px).train()
    x = torch.randn(2, 3, px, px)
    with FlopCounterMode(display=False) as counter: net(x).sum().backward()
    return counter.get_total_flops()/2/1e9

def batch_of(stage, arch, px, device, limit):
    "Images (stage one) or classes (stage two) that a step loads, and images that its network sees; a bare step takes at most `limit` s"
    n,images = (ONE.bs, lambda n: 4*n) if stage == 'one' else (TWO.n_way, lambda n: n*(TWO.k_shot + TWO.n_query))
    probe = bare(arch, px, 8, device)
    probe(1)
    per_image = probe(1)/8
    while images(n)*per_image > limit and n > 2: n //= 2
    return n,images(n)

def learner(stage, arch, px, n, steps, compile=False, view='clean'):
    "The recipe's (Learner, fit) on made-up data, with `n` images (stage one) or classes (stage two) per step, and `steps` steps per epoch"
    kwargs = dict(compile=compile, valid=dict(n_way=5, k_shot=1, n_query=5, n_episodes=10), keep_best=False)
    if stage == 'one':
        return stage_one(MadeUp(px, max(N_CLASSES, n*steps), N_CLASSES), ONE.but(arch=arch, bs=n), **kwargs)
    data = MadeUp(px, 40*N_CLASSES if px < 84 else 10*N_CLASSES, N_CLASSES)
    net = create_backbone(arch, 0, px)
    def random(): return np.random.default_rng(0).standard_normal((len(data.train), net.num_features), np.float32)
    known = dict(clean=lambda: torch.from_numpy(random()), views=lambda: ViewFeatures([random().astype(np.float16)]*20), same=None)[view]
    return stage_two(data, TWO.but(n_way=n, n_episodes=steps, teacher_view=view), net, create_backbone(arch, 0, px, 1), known, **kwargs)

def in_turns(stage, arch, px, other, repeats, step, least=1., compile=False, view='clean'):
    """Median seconds of a step of the recipe and of the other side, which take turns, and the images of a step

    `other` gets the number of images or classes that a step loads and of images that its network sees, and returns the other side's steps.
    """
    device = torch.device(default_device())
    n,images = batch_of(stage, arch, px, device, step)
    learn,fit = learner(stage, arch, px, n, 4 + (repeats + 1)*200, compile, view)
    turns = Turns(other(n, images), repeats, least)
    learn.add_cb(turns)
    with learn.no_bar(), learn.no_logging(): fit(learn)
    return statistics.median(turns.mine),statistics.median(turns.others),images

def beside_bare(stage, arch, px, repeats, step, compile=False, view='clean'):
    "The recipe's step beside a bare one, as the entries of a line"
    device = torch.device(default_device())
    mine,others,images = in_turns(stage, arch, px, lambda n, images: bare(arch, px, images, device, compile), repeats, step,
                                  compile=compile, view=view)
    flops = gflop_per_image(arch, px)
    return dict(ratio=round(others/mine, 3), recipe_ms=round(1e3*mine, 2), bare_ms=round(1e3*others, 2), images=images,
                gflop_per_image=round(flops, 3), gflop_per_second=round(flops*images/mine),
                precision=str(autocast_dtype(device) or torch.float32).removeprefix('torch.'), compile=compile, repeats=repeats)


# ---- plain fastai -----------------------------------------------------------------------------------------------------

def plain_dls(data, bs):
    "DataLoaders as the tutorials of fastai make them, with albumentations on each image"
    import albumentations as A
    from fastai.vision.all import Category, Datasets, IntToFloatTensor, Normalize, PILImage, ToTensor
    px = data.px
    aug = A.Compose([A.Pad(4), A.RandomCrop(px, px), A.ColorJitter(.4, .4, .4, hue=0., p=1.), A.HorizontalFlip()])
    rows = range(len(data.train))
    sets = Datasets(rows, [[lambda i: PILImage.create(aug(image=data.train.images[i])['image'])],
                           [lambda i: Category(data.train.vocab[data.train.y[i]]), data.train.vocab.index]],
                    splits=(rows, rows[:bs]))
    return sets.dataloaders(bs=bs, after_item=[ToTensor()], after_batch=[IntToFloatTensor(), Normalize.from_stats(*data.stats)],
                            num_workers=0, device=torch.device('cpu'))

def plain_convnet4():
    "ConvNet-4 with its blocks as papers write them"
    channels = (3, 64, 64, 64, 64)
    blocks = []
    for i,(ni,nf) in enumerate(zip(channels, channels[1:])):
        blocks.append(nn.Sequential(nn.Conv2d(ni, nf, 3, padding=1), nn.BatchNorm2d(nf), nn.ReLU(), *([nn.MaxPool2d(2)] if i < 3 else [])))
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, N_CLASSES))

class Rotations(Callback):
    "Train on four rotations of each image, and add the loss of the layer `head`, which predicts the rotation"
    def __init__(self, head): self.head = head
    def before_batch(self):
        x,y = self.xb[0],self.yb[0]
        self.learn.xb = (torch.cat([torch.rot90(x, k, (2, 3)) for k in range(4)]),)
        self.learn.yb = (y.repeat(4),)
        self.angles = torch.arange(4).repeat_interleave(len(x))
    def after_loss(self): self.learn.loss_grad = self.loss_grad + F.cross_entropy(self.head(self.pred), self.angles)

class Ask(Callback):
    "Send the seconds of the last steps through `pipe`, and receive the number of the next steps; 0 ends the fit"
    order = 1000
    def __init__(self, pipe): self.pipe = pipe
    def before_fit(self):
        self.left = 0
        self.begun = time.perf_counter()
    def after_batch(self):
        self.left -= 1
        if self.left > 0: return
        self.pipe.send(time.perf_counter() - self.begun)
        self.left = self.pipe.recv()
        if not self.left: raise CancelFitException()
        self.begun = time.perf_counter()

def plain(pipe, px, bs, n_images, threads):
    "Train a Learner as the tutorials of fastai make it, for as many steps as `pipe` asks for; this runs in its own process"
    from fastai.vision.all import CrossEntropyLossFlat, Learner, OptimWrapper
    torch.set_num_threads(threads)
    dls = plain_dls(MadeUp(px, n_images, N_CLASSES), bs)
    net = plain_convnet4()
    head = nn.Linear(N_CLASSES, 4)
    params = [*net.parameters(), *head.parameters()]
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), cbs=[Rotations(head), Ask(pipe)], splitter=lambda _: params,
                    opt_func=lambda ps, **kw: OptimWrapper(ps, torch.optim.SGD, momentum=0.9, weight_decay=5e-4, **kw), metrics=[])
    with learn.no_bar(), learn.no_logging(): learn.fit(1000, 0.01)

def other_process(px, bs, n_images):
    "A function of k that makes k steps of `plain` in its own process and returns the seconds per step"
    context = multiprocessing.get_context('spawn')
    mine,theirs = context.Pipe()
    context.Process(target=plain, args=(theirs, px, bs, n_images, torch.get_num_threads()), daemon=True).start()
    mine.recv() # the first step
    def steps(k):
        mine.send(k)
        return mine.recv()/k
    return steps


@call_parse
def main(
    repeats:int=5, # number of times that each measurement is repeated
    step:float=2., # longest time of a bare step in seconds; larger batches are halved
    archs:str='convnet4,resnet12', # timm models, separated by commas
    sides:str='32,84', # sides of the images in pixels, separated by commas
    compile:bool=False, # compile the bare network and the recipe's with torch.compile
    out:str=None, # JSON file for the lines with device, versions and commit
):
    "Time training steps"
    device = default_device().type
    for arch in archs.split(','):
        for px in map(int, sides.split(',')):
            for stage in ('one', 'two'):
                found = beside_bare(stage, arch, px, repeats, step, compile)
                print_line(name=arch, stage=stage, px=px, device=device, **found)
            if px == 32: # `found` is stage two's
                views,looking = (beside_bare('two', arch, px, repeats, step, compile, view) for view in ('views', 'same'))
                print_line(name=f'teacher {arch}', stage='two', px=px, device=device, features_known_ms=found['recipe_ms'],
                    views_known_ms=views['recipe_ms'], views_known_ratio=views['ratio'], forward_on_the_batch_ms=looking['recipe_ms'],
                    images=found['images'], repeats=repeats)
    if device == 'cpu':
        mine,others,images = in_turns('one', 'convnet4', 32, lambda n, images: other_process(32, n, 64*n), repeats, step, 2.)
        print_line(name='convnet4 beside plain fastai', stage='one', px=32, device='cpu', speedup=round(others/mine, 2),
            recipe_images_per_second=round(images/mine), plain_images_per_second=round(images/others), repeats=repeats)
    write(out)
