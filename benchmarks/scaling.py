"""Time and memory as images, classes and episodes grow a hundred-fold

    python benchmarks/scaling.py                                # two minutes on two cores
    python benchmarks/scaling.py --images 6000,60000,600000 --out benchmarks/scaling.json    # what README.md here shows: ten minutes

Each line is a process of its own: the seconds its work took, without imports, and `anonymous_mb`, the most memory it held beside the
pages of files it had mapped (which the system takes back as it likes), `mapped_mb`, the most of those. `prepare` packs a zip of PNGs;
`train` is an epoch's order and 100 steps of ConvNet-4, images from a cache on disk; `embed` is ConvNet-4's features of a split a tenth as
large; `evaluate` classifies episodes of known features.
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
from common import say, seconds, write
from fastai.callback.core import Callback, CancelFitException
from fastcore.script import call_parse


def peak(name):
    "MB that this process holds now, of a kind in /proc/self/status"
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(name))/1024

class Peaks(threading.Thread):
    "The most of anonymous and of mapped memory while it runs, looked at twenty times a second"
    def __init__(self): super().__init__(daemon=True); self.anonymous = self.mapped = 0.
    def look(self): self.anonymous,self.mapped = max(self.anonymous, peak('RssAnon')),max(self.mapped, peak('RssFile'))
    def run(self):
        while True: self.look(); time.sleep(.05)

def child(pipe, work, args):
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
    "A line about `work(*args)` in a process of its own; it returns seconds"
    context = multiprocessing.get_context('spawn')
    mine,theirs = context.Pipe()
    p = context.Process(target=child, args=(theirs, work, args))
    p.start()
    theirs.close() # an end that is heard if it dies
    took,anonymous,mapped = mine.recv()
    p.join()
    say(name=name, **sizes, seconds=round(took, 2), anonymous_mb=round(anonymous), mapped_mb=round(mapped))


# ---- the works --------------------------------------------------------------------------------------------------------

def pngs(path, n_images, n_classes, px=32):
    "A zip of `n_images` in class folders under train (8 of 10), val and test"
    from PIL import Image
    rng,shapes = np.random.default_rng(0),[]
    for image in rng.integers(0, 256, (256, px//4, px//4, 3), dtype=np.uint8): # as many different ones, of four times four pixels a colour
        buf = io.BytesIO()
        Image.fromarray(image.repeat(4, 0).repeat(4, 1)).save(buf, 'png', compress_level=1)
        shapes.append(buf.getvalue())
    with zipfile.ZipFile(path, 'w') as z:
        for i in range(n_images):
            c = i*n_classes//n_images
            z.writestr(f'{("train","val","test")[max(0, c % 10 - 7)]}/c{c:05d}/{i:07d}.png', shapes[i % 256])

def prepare(path, cache):
    from grdd_fastai.data.cache import few_shot_data
    return seconds(few_shot_data, path, cache=cache)

class Steps(Callback):
    "Ends a fit after `n` steps"
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
    h,y = torch.rand(n_images, 64),torch.arange(n_images)*n_classes//n_images
    return seconds(evaluate, h, y, 5, 1, 5, n_episodes)


@call_parse
def main(
    images:str='600,6000,60000', # of the data sets, separated by commas
    episodes:str='1000,10000,100000', # separated by commas
    out:str=None, # file that takes the lines with hardware, versions and commit, as JSON
):
    "Measure growth"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for n in map(int, images.split(',')):
            path,cache,n_classes = folder/f'{n}.zip',folder/f'cache{n}',max(100, n//600)
            pngs(path, n, n_classes)
            measure('prepare', prepare, path, cache, images=n, classes=n_classes)
            for work in (train, embed): measure(work.__name__, work, path, cache, images=n, classes=n_classes)
            path.unlink()
    counts = [int(n) for n in episodes.split(',')]
    for n in counts: measure('evaluate', evaluate, 12_000, 20, n, images=12_000, classes=20, episodes=n)
    for c in (20, 200, 2000): measure('evaluate', evaluate, 24_000, c, counts[0], images=24_000, classes=c, episodes=counts[0])
    write(out)
