"""The recipes' training step beside the bare network's: what everything around the network's own arithmetic costs

    python benchmarks/train_step.py                             # four minutes on two cores
    python benchmarks/train_step.py --out benchmarks/train_step.json      # what README.md here shows

Stage one with rotation and stage two with the teacher's features known beforehand, ConvNet-4 and ResNet-12, 32 and 84 px: `fit`, that is
loading, augmentation, rotation or episodes, loss, the optimiser and every callback, against forward, cross-entropy, backward and SGD step
of the network alone on a resident batch of the same shape, in the same precision and memory format. The two take turns in one process; a
line has the medians of their times for a step and `ratio`, bare / recipe: 1 is a step that costs the network's arithmetic and no more. A
batch is the recipe's (64 images at four rotations; 20-way 1-shot with 6 queries), halved until a bare step takes less than `--step`
seconds.

A line `teacher` has stage two's step with the features known and with the teacher's forward pass on the batch, teacher and student alike.
The last line is ConvNet-4's stage one at 32 px against plain fastai: an item at a time through albumentations, float32, contiguous, the
blocks as they are written in papers, in a process of its own, in turns as well.
"""
import multiprocessing
import statistics
import time

import torch
import torch.nn.functional as F
from common import MadeUp, say, wait, write
from fastai.callback.core import Callback, CancelFitException
from fastai.torch_core import default_device
from fastcore.script import call_parse
from torch.utils.flop_counter import FlopCounterMode

from grdd_fastai.core.device import amp, autocast_dtype
from grdd_fastai.models.create import create_backbone
from grdd_fastai.stage_one import StageOne, stage_one
from grdd_fastai.stage_two import PRESETS, stage_two

N_CLASSES = 64
ONE = StageOne(bs=64, epochs=1, schedule='one_cycle', lr=0.01)
TWO = PRESETS['best'].but(epochs=1, lr=1e-3)


class Turns(Callback):
    "Time a few steps of the fit, then of `other`, and again; the fit ends when there are `repeats` of each"
    order,run_valid = 1000,False
    def __init__(self, other, repeats, least=1.): self.other,self.repeats,self.least = other,repeats,least # seconds a turn takes at least
    def before_fit(self): self.mine,self.others,self.steps,self.turn,self.begun = [],[],0,None,None
    def after_batch(self):
        now = wait(torch.device(self.dls.device))
        self.steps += 1
        if self.iter < 2: self.begun = now # the first steps warm up
        elif self.turn is None: # the third says how many steps a turn has
            self.turn = max(1, round(self.least/(now - self.begun)))
            self.other(self.turn)
            self.steps,self.begun = 0,wait(torch.device(self.dls.device))
        elif self.steps == self.turn:
            self.mine.append((now - self.begun)/self.turn)
            self.others.append(self.other(self.turn))
            if len(self.mine) == self.repeats: raise CancelFitException()
            self.steps,self.begun = 0,wait(torch.device(self.dls.device))


def bare(arch, px, n_images, device, compile=False):
    "A function of k: the time for one of k steps of the network alone"
    net,dtype = create_backbone(arch, N_CLASSES, px).to(device, memory_format=torch.channels_last).train(),autocast_dtype(device)
    if compile:
        for part in net.children(): part.compile()
    opt = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    x,y = (torch.randn(n_images, 3, px, px, device=device).to(memory_format=torch.channels_last),
           torch.randint(0, N_CLASSES, (n_images,), device=device))
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
    "Floating-point operations of a forward and a backward pass, counted, in 1e9 an image"
    net,x = create_backbone(arch, N_CLASSES, px).train(),torch.randn(2, 3, px, px)
    with FlopCounterMode(display=False) as counter: net(x).sum().backward()
    return counter.get_total_flops()/2/1e9

def batch_of(stage, arch, px, device, limit):
    "Images from the loader for a step (or ways of an episode), and images the network sees"
    n,images = (ONE.bs, lambda n: 4*n) if stage == 'one' else (TWO.n_way, lambda n: n*(TWO.k_shot + TWO.n_query))
    probe = bare(arch, px, 8, device)
    probe(1)
    per_image = probe(1)/8
    while images(n)*per_image > limit and n > 2: n //= 2
    return n,images(n)

def learner(stage, arch, px, n, steps, compile, view):
    "The recipe's Learner and fit on made-up data, with a batch of `n`"
    kwargs = dict(compile=compile, valid=dict(n_way=5, k_shot=1, n_query=5, n_episodes=10), keep_best=False)
    if stage == 'one':
        return stage_one(MadeUp(px, max(N_CLASSES, n*steps), N_CLASSES), ONE.but(arch=arch, bs=n), **kwargs)
    data,net = MadeUp(px, 40*N_CLASSES if px < 84 else 10*N_CLASSES, N_CLASSES),create_backbone(arch, 0, px)
    known = torch.randn(len(data.train), net.num_features) if view == 'clean' else None
    return stage_two(data, TWO.but(n_way=n, n_episodes=steps, teacher_view=view), net, create_backbone(arch, 0, px, 1), known, **kwargs)


# ---- plain fastai -----------------------------------------------------------------------------------------------------

def plain(pipe, px, bs, n_images, threads):
    "In a process of its own: steps of a Learner as the tutorials make it, as many as `pipe` asks for"
    import albumentations as A
    from fastai.vision.all import (
        Category,
        CrossEntropyLossFlat,
        Datasets,
        IntToFloatTensor,
        Learner,
        Normalize,
        OptimWrapper,
        PILImage,
        ToTensor,
    )
    from torch import nn
    torch.set_num_threads(threads)
    data = MadeUp(px, n_images, N_CLASSES)
    aug = A.Compose([A.Pad(4), A.RandomCrop(px, px), A.ColorJitter(.4, .4, .4, hue=0., p=1.), A.HorizontalFlip()])
    rows = range(n_images)
    sets = Datasets(rows, [[lambda i: PILImage.create(aug(image=data.train.images[i])['image'])],
                           [lambda i: Category(data.train.vocab[data.train.y[i]]), data.train.vocab.index]],
                    splits=(rows, rows[:bs]))
    dls = sets.dataloaders(bs=bs, after_item=[ToTensor()], after_batch=[IntToFloatTensor(), Normalize.from_stats(*data.stats)],
                           num_workers=0, device=torch.device('cpu'))
    chs = (3, 64, 64, 64, 64)
    blocks = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), *([nn.MaxPool2d(2)] if i < 3 else []))
              for i,(a,b) in enumerate(zip(chs, chs[1:]))]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, N_CLASSES))
    turn = nn.Linear(N_CLASSES, 4)
    class Rotations(Callback):
        def before_batch(self):
            x,y = self.xb[0],self.yb[0]
            self.learn.xb,self.learn.yb = (torch.cat([torch.rot90(x, k, (2, 3)) for k in range(4)]),),(y.repeat(4),)
            self.angles = torch.arange(4).repeat_interleave(len(x))
        def after_loss(self): self.learn.loss_grad = self.loss_grad + F.cross_entropy(turn(self.pred), self.angles)
    class Ask(Callback):
        order = 1000
        def before_fit(self): self.left,self.begun = 0,time.perf_counter()
        def after_batch(self):
            self.left -= 1
            if self.left > 0: return
            pipe.send(time.perf_counter() - self.begun)
            self.left = pipe.recv()
            if not self.left: raise CancelFitException()
            self.begun = time.perf_counter()
    params = [*net.parameters(), *turn.parameters()]
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), cbs=[Rotations(), Ask()], splitter=lambda _: params,
                    opt_func=lambda ps, **kw: OptimWrapper(ps, torch.optim.SGD, momentum=0.9, weight_decay=5e-4, **kw), metrics=[])
    with learn.no_bar(), learn.no_logging(): learn.fit(1000, 0.01)

def other_process(px, bs, n_images):
    "A function of k: the time for one of k steps of `plain`"
    mine,theirs = multiprocessing.get_context('spawn').Pipe()
    multiprocessing.get_context('spawn').Process(
        target=plain, args=(theirs, px, bs, n_images, torch.get_num_threads()), daemon=True).start()
    mine.recv() # its first step
    def steps(k):
        mine.send(k)
        return mine.recv()/k
    return steps


@call_parse
def main(
    repeats:int=5, # of each measurement, taken in turns
    step:float=2., # seconds a bare step may take: larger batches are halved
    archs:str='convnet4,resnet12', # timm models, separated by commas
    sides:str='32,84', # of the images, separated by commas
    compile:bool=False, # networks, bare and in the recipe, by torch.compile
    out:str=None, # file that takes the lines with hardware, versions and commit, as JSON
):
    "Time training steps"
    device = torch.device(default_device())
    def measure(stage, arch, px, other, least, view='clean'):
        n,images = batch_of(stage, arch, px, device, step)
        learn,fit = learner(stage, arch, px, n, 4 + (repeats + 1)*200, compile, view)
        turns = Turns(other(n, images), repeats, least)
        learn.add_cb(turns)
        with learn.no_bar(), learn.no_logging(): fit(learn)
        return statistics.median(turns.mine),statistics.median(turns.others),images
    for arch in archs.split(','):
        for px in map(int, sides.split(',')):
            for stage in ('one', 'two'):
                mine,others,images = measure(stage, arch, px, lambda n, images: bare(arch, px, images, device, compile), 1.)  # noqa: B023
                flops = gflop_per_image(arch, px)
                say(name=arch, stage=stage, px=px, device=device.type, ratio=round(others/mine, 3), recipe_ms=round(1e3*mine, 1),
                    bare_ms=round(1e3*others, 1), images=images,
                    gflop_per_image=round(flops, 3), gflop_per_second=round(flops*images/mine),
                    precision=str(autocast_dtype(device) or torch.float32).removeprefix('torch.'), compile=compile, repeats=repeats)
            if px == 32: # `mine` is stage two's
                looking,others,images = measure(
                    'two', arch, px, lambda n, images: bare(arch, px, images, device, compile), 1., 'same')  # noqa: B023
                say(name=f'teacher {arch}', stage='two', px=px, device=device.type, features_known_ms=round(1e3*mine, 1),
                    forward_on_the_batch_ms=round(1e3*looking, 1), images=images, repeats=repeats)
    if device.type == 'cpu':
        mine,others,images = measure('one', 'convnet4', 32, lambda n, images: other_process(32, n, 64*n), 2.)
        say(name='convnet4 beside plain fastai', stage='one', px=32, device='cpu', speedup=round(others/mine, 2),
            recipe_images_per_second=round(images/mine), plain_images_per_second=round(images/others), repeats=repeats)
    write(out)
