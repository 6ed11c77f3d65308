"""Look a data set over before anything is measured on it

    python recipes/check_data.py --data mini-imagenet/ --px 84
    python recipes/check_data.py --data mini-imagenet/ --px 84 --json check.json --fix clean-lists/
    python recipes/mini_5w1s.py --data mini-imagenet/ --split clean-lists/

Every image is read. What is found is printed: unreadable, constant and small images, exact and near copies within and across splits,
classes too small for the episodes, the class list that it follows, and whether it is CIFAR-FS to the pixel. The exit code is 1 if something
spoils what is measured. `--fix` writes lists of the sound images for `--split`; it changes no image.
"""
import sys
from typing import Annotated

from fastcore.script import call_parse

from grdd_fastai.check_data import check_data
from grdd_fastai.core.distributed import log
from grdd_fastai.settings import at_least, exact_flags


@call_parse
@exact_flags
def main(
    data:str=None, # raw data set in any layout of data/README.md (default: fetch CIFAR-FS)
    px:int=32, # side of the images in pixels, as they will be used
    way:Annotated[int, at_least(2)]=5, # classes of an episode
    shot:Annotated[int, at_least(1)]=5, # support images of a class
    query:Annotated[int, at_least(1)]=15, # query images of a class
    seed:int=0, # seed of the split of a folder of class folders
    split:str=None, # list that splits the data in place of its own splits, as in the other recipes
    resize:str='fit', # how images become squares: fit, squash, crop92 or squash92
    interpolation:str='bicubic', # how images are resized
    json:str=None, # JSON file for everything that is found
    fix:str=None, # folder for lists of the images without serious faults
):
    "Look a data set over before anything is measured on it"
    found = check_data(data, px, way, shot, query, seed, split, resize, interpolation)
    print(found)
    if json: found.to_json(json)
    if fix: log(f'{found.fix(fix)}: give it as --split')
    if not found.ok: sys.exit(1)
