"""Images per second of the loaders alone

    python benchmarks/data.py                                   # a minute on two cores
    python benchmarks/data.py --out benchmarks/data.json        # for benchmarks/README.md

The loaders of both stages read packed made-up images, from the memory map to the normalised float batch: without augmentation, with
augmentation of a whole batch at once, and with albumentations, which augments one image after the other. `us` is microseconds per image.
Times are medians.
"""
import statistics
import time

from common import MadeUp, print_line, write
from fastcore.script import call_parse

from grdd_fastai.data.augment import train_augmentation
from grdd_fastai.data.blocks import category_dls, episodic_dls


def per_image(dl, least=1.):
    "Seconds per image, measured over so many epochs that they take at least `least` seconds"
    n = 0
    begun = time.perf_counter()
    while not n or time.perf_counter() - begun < least:
        for x,_ in dl: n += len(x)
    return (time.perf_counter() - begun)/n

@call_parse
def main(
    repeats:int=5, # number of times that each measurement is repeated
    sides:str='32,84', # sides of the images in pixels, separated by commas
    out:str=None, # JSON file for the lines with device, versions and commit
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
                print_line(name=name, augmentation=kind, px=px, images_per_second=round(1/took), us=round(1e6*took, 1), repeats=repeats)
    write(out)
