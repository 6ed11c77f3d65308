"""Images a second of the loaders alone

    python benchmarks/data.py                                   # a minute on two cores
    python benchmarks/data.py --out benchmarks/data.json        # what README.md here shows

Stage one's and stage two's loaders on packed made-up images, from the memory map to the normalised float batch: not augmented, augmented
a batch at a time and by albumentations an image at a time. `us` is microseconds an image. Medians.
"""
import statistics
import time

from common import MadeUp, say, write
from fastcore.script import call_parse

from grdd_fastai.data.augment import train_augmentation
from grdd_fastai.data.blocks import category_dls, episodic_dls


def per_image(dl, least=1.):
    "Seconds an image, over the epochs that fill `least` seconds"
    n,begun = 0,time.perf_counter()
    while not n or time.perf_counter() - begun < least:
        for x,_ in dl: n += len(x)
    return (time.perf_counter() - begun)/n

@call_parse
def main(
    repeats:int=5, # of each measurement
    sides:str='32,84', # of the images, separated by commas
    out:str=None, # file that takes the lines with hardware, versions and commit, as JSON
):
    "Time the loaders"
    for px in map(int, sides.split(',')):
        data = MadeUp(px, 64*60)
        augs = {'none':None, 'batch, no jitter':train_augmentation(px, jitter=False), 'batch':train_augmentation(px),
                'albumentations':train_augmentation(px, by='albumentations')}
        loaders = {'batches of 64':lambda aug, data=data: category_dls(data, aug=aug),
                   '20-way episodes':lambda aug, data=data: episodic_dls(data, 20, 1, 6, n_episodes=20, aug=aug)}
        for name,make in loaders.items():
            for kind,aug in augs.items():
                dl = make(aug).train
                per_image(dl, 0.)
                took = statistics.median(per_image(dl, 0.5) for _ in range(repeats))
                say(name=name, augmentation=kind, px=px, images_per_second=round(1/took), us=round(1e6*took, 1), repeats=repeats)
    write(out)
