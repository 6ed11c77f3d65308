"""Turn a raw data set into split CSVs plus images

    python recipes/prepare_data.py --data cifar-fs.zip --out data/cifar-fs

The other recipes read raw data sets directly; this one is for looking at, editing or sharing the split.
"""
from fastcore.script import call_parse

from grdd_fastai.data.sources import prepare


@call_parse
def main(
    data:str=None, # raw data set in any layout of data/README.md (none: fetch CIFAR-FS)
    out:str='data/prepared', # new folder for train.csv, val.csv, test.csv and images/
    seed:int=0, # splits a folder of class folders 64/16/20 % by class
):
    "Turn a raw data set into train.csv, val.csv, test.csv (filename,label) and images/"
    print(prepare(data, out, seed))
