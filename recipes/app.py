"""Classify photos by a few examples in the browser, without any training

    python recipes/app.py
    python recipes/app.py --support few/ --unknown 0.1

Drop photos of each class, see the accuracy to expect, drop other photos, and click on a wrong one to correct it: it becomes an example. The
classifier can be downloaded for `FewShotClassifier.load`, with a table and a page of the photos. Needs `pip install 'grdd-fastai[app]'`.
"""
import warnings

from fastcore.script import call_parse

from grdd_fastai.core.distributed import log
from grdd_fastai.photos.app import launch
from grdd_fastai.photos.classifier import make_classifier
from grdd_fastai.settings import exact_flags


@call_parse
@exact_flags
def main(
    support:str=None, # folder with a folder of example photos for each class, to begin with (none)
    load:str=None, # in place of --support: folder of a saved classifier
    network:str=None, # a timm name with weights, a folder of a run or of recipes/publish.py (convnet4.grdd_cifarfs)
    classifier:str=None, # classifier, or auto: the best for photos that are held out (simpleshot_l2n)
    unknown:float=None, # share of photos of these classes that may be called unknown, so that photos of others are (none)
    host:str='127.0.0.1', # address of this machine that the page is served at; 0.0.0.0: at all, for everybody in the network
    port:int=7860, # port of the page
    browser:bool=False, # open the page in the browser
):
    "Classify photos by a few examples in the browser"
    warnings.showwarning = lambda message, *_: log(f'warning: {message}')
    launch(make_classifier(support, load, network=network, classifier=classifier, unknown=unknown), host, port, browser)
