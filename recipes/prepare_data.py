"""Turn a raw data set into images and a CSV file for each split

    python recipes/prepare_data.py --data cifar-fs.zip --out data/cifar-fs

The other recipes read raw data sets directly. Use this one to look at the split, to edit it or to share it.
"""
from fastcore.script import call_parse

from grdd_fastai.data.sources import prepare
from grdd_fastai.settings import exact_flags


@call_parse
@exact_flags
def main(
    data:str=None, # raw data set in any layout of data/README.md (default: fetch CIFAR-FS)
    out:str='data/prepared', # new folder for train.csv, val.csv, test.csv and images/
    seed:int=0, # seed of the split of a folder of class folders: 64, 16 and 20 % of the classes
):
    "Turn a raw data set into train.csv, val.csv, test.csv (filename,label) and images/"
    print(prepare(data, out, seed))
