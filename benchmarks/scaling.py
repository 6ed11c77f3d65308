"""Measure how time and memory grow with a hundred times the images, classes and episodes

    python benchmarks/scaling.py                                # two minutes on two cores
    python benchmarks/scaling.py --images 6000,60000,600000 --out benchmarks/scaling.json    # ten minutes, for benchmarks/README.md

Each line is measured in its own process. It has the seconds of the work without imports, `anonymous_mb`, the largest memory of the process
without mapped files, and `mapped_mb`, the largest memory of mapped files, which the system takes back when it needs it. `prepare` packs a
zip of PNGs. `train` is the order of an epoch and 100 steps of ConvNet-4, with images from a cache on disk. `embed` is the features of
ConvNet-4 for a split of a tenth of the images. `evaluate` classifies episodes of given features.
"""
import io
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
from common import print_line, seconds, write
from fastai.callback.core import Callback, CancelFitException
from fastcore.script import call_parse


def peak(name):
    "MB of the memory that /proc/self/status calls `name`, for this process now"
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(name))/1024

class Peaks(threading.Thread):
    "Watch the memory of this process twenty times per second, and keep the largest `anonymous` and `mapped` memory in MB"
    def __init__(self):
        super().__init__(daemon=True)
        self.anonymous = self.mapped = 0.
    def look(self):
        self.anonymous = max(self.anonymous, peak('RssAnon'))
        self.mapped = max(self.mapped, peak('RssFile'))
    def run(self):
        while True:
            self.look()
            time.sleep(.05)

def child(pipe, work, args):
    "Send (seconds, anonymous MB, mapped MB) of `work(*args)` through `pipe`; this runs in its own process"
    import torch
    torch.set_num_threads(os.cpu_count())
    peaks = Peaks()
    with open(os.devnull, 'w') as nothing:
        sys.stderr = nothing
        peaks.start()
        took = work(*args)
        peaks.look()
    pipe.send((took, peaks.anonymous, peaks.mapped))

def measure(name, work, *args, **sizes):
    "Print a line with the time and the memory of `work(*args)`, which runs in its own process and returns its seconds"
    context = multiprocessing.get_context('spawn')
    mine,theirs = context.Pipe()
    p = context.Process(target=child, args=(theirs, work, args))
    p.start()
    theirs.close() # so that `recv` raises EOFError if the process dies
    took,anonymous,mapped = mine.recv()
    p.join()
    print_line(name=name, **sizes, seconds=round(took, 2), anonymous_mb=round(anonymous), mapped_mb=round(mapped))


# ---- work that is measured --------------------------------------------------------------------------------------------

def pngs(path, n_images, n_classes, px=32):
    "Write a zip of `n_images` PNGs in class folders in train (8 of 10 classes), val and test"
    from PIL import Image
    shapes = []
    for image in np.random.default_rng(0).integers(0, 256, (256, px//4, px//4, 3), dtype=np.uint8): # 256 images of 4 x 4 px squares
        buf = io.BytesIO()
        Image.fromarray(image.repeat(4, 0).repeat(4, 1)).save(buf, 'png', compress_level=1)
        shapes.append(buf.getvalue())
    with zipfile.ZipFile(path, 'w') as z:
        for i in range(n_images):
            c = i*n_classes//n_images
            split = ('train', 'val', 'test')[max(0, c % 10 - 7)]
            z.writestr(f'{split}/c{c:05d}/{i:07d}.png', shapes[i % 256])

def prepare(path, cache):
    from grdd_fastai.data.cache import few_shot_data
    return seconds(few_shot_data, path, cache=cache)

class Steps(Callback):
    "End a fit after `n` steps"
    run_valid = False
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.iter + 1 == self.n: raise CancelFitException()

def train(path, cache):
    from grdd_fastai.data.cache import few_shot_data
    from grdd_fastai.stage_one import StageOne, stage_one
    data = few_shot_data(path, cache=cache)
    learn,fit = stage_one(data, StageOne(arch='convnet4', epochs=1, rotation=False), valid=dict(n_query=5), cbs=Steps(100))
    with learn.no_bar(), learn.no_logging(): return seconds(fit, learn)

def embed(path, cache):
    from grdd_fastai.data.blocks import plain_dl
    from grdd_fastai.data.cache import few_shot_data
    from grdd_fastai.fewshot.embed import embed
    from grdd_fastai.models.create import create_backbone
    dl = plain_dl(few_shot_data(path, cache=cache), 'test')
    return seconds(embed, create_backbone('convnet4'), dl)

def evaluate(n_images, n_classes, n_episodes):
    import torch

    from grdd_fastai.fewshot.evaluate import evaluate
    h = torch.rand(n_images, 64)
    y = torch.arange(n_images)*n_classes//n_images
    return seconds(evaluate, h, y, 5, 1, 5, n_episodes)


@call_parse
def main(
    images:str='600,6000,60000', # numbers of images of the data sets, separated by commas
    episodes:str='1000,10000,100000', # numbers of episodes, separated by commas
    out:str=None, # JSON file for the lines with device, versions and commit
):
    "Measure how time and memory grow"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for n in map(int, images.split(',')):
            path,cache = folder/f'{n}.zip',folder/f'cache{n}'
            n_classes = max(100, n//600)
            pngs(path, n, n_classes)
            measure('prepare', prepare, path, cache, images=n, classes=n_classes)
            for work in (train, embed): measure(work.__name__, work, path, cache, images=n, classes=n_classes)
            path.unlink()
    counts = [int(n) for n in episodes.split(',')]
    for n in counts: measure('evaluate', evaluate, 12_000, 20, n, images=12_000, classes=20, episodes=n)
    for c in (20, 200, 2000): measure('evaluate', evaluate, 24_000, c, counts[0], images=24_000, classes=c, episodes=counts[0])
    write(out)
