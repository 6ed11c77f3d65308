"""What strangers and accidents put in the way of several parts at once: a sentence each, no hang."""
import os
import signal

import numpy as np
import pytest
import torch
from helpers import NO_FOLDER, files_of, laid_out, posix, recipe, says, settings, stopped

from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.data.sources import open_source, prepare
from grdd_fastai.experiments.table import CL, EL, table
from grdd_fastai.models.create import create_backbone
from grdd_fastai.models.pretrained import load_network
from grdd_fastai.photos.classifier import FewShotClassifier

CL_EL = {'CL':CL, 'CL+EL':EL}


@pytest.mark.parametrize('out', ['', ' '])
def test_an_empty_out_is_refused(csv_set, cache, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    says(lambda: recipe('cifarfs_5w1s')(out=out, **settings(csv_set, cache)), '--out is empty')
    says(lambda: table('a', dict(CL=CL), out=out, data=str(csv_set)), '--out is empty')
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('path', ['~nobody9/x', 'x'*300, 'a\0b', NO_FOLDER])
def test_paths_that_cannot_be(csv_set, cache, tmp_path, path):
    for call in (lambda: recipe('cifarfs_5w1s')(out=path, **settings(csv_set, cache)),
                 lambda: recipe('cifarfs_5w1s')(out=path, resume=True, **settings(csv_set, cache)),
                 lambda: table('a', CL_EL, out=path, data=str(csv_set)),
                 lambda: few_shot_data(csv_set, px=8, cache=path), lambda: load_network(path), lambda: FewShotClassifier.from_folder(path),
                 lambda: open_source(path)): says(call)

@posix
def test_a_folder_by_a_name_that_is_no_utf8(csv_set, cache, tmp_path):
    out = os.fsdecode(os.fsencode(tmp_path) + b'/caf\xe9')
    for _ in range(2): recipe('cifarfs_5w1s')(out=out, resume=True, max_minutes=1e-9, **settings(csv_set, cache))
    r = recipe('cifarfs_5w1s')(out=out, resume=True, **settings(csv_set, cache))
    assert recipe('cifarfs_5w1s')(out=out, resume=True, **settings(csv_set, cache)) == r and load_network(out).num_classes == 0

@posix
@pytest.mark.parametrize('where', ['grdd_fastai.core.storage.digest', 'grdd_fastai.models.pretrained.digest',
                                   'grdd_fastai.data.cache._fingerprint'])
def test_a_signal_is_never_taken_for_a_damaged_file(finished, csv_set, cache, tmp_path, monkeypatch, where):
    "It ends the program with its code, and no file is refused or made anew"
    out = (stopped(csv_set, cache, tmp_path/'run', 2) if 'storage' in where
           else laid_out({k:v for k,v in finished.items() if 'grdd' not in k and k != 'result.json'}, tmp_path/'run'))
    before = {k:v for k,v in files_of(out).items() if k != 'result.json'}
    def hit(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError('it goes on')
    monkeypatch.setattr(where, hit)
    with pytest.raises(SystemExit) as e: recipe('cifarfs_5w1s')(out=str(out), resume=True, **settings(csv_set, cache))
    assert e.value.code == 143 and {k:v for k,v in files_of(out).items() if k != 'result.json'} == before

@pytest.mark.parametrize('call', [lambda n: FewShotClassifier(torch.nn.Linear(3, 2)), lambda n: FewShotClassifier(n, bs=0),
                                  lambda n: FewShotClassifier(n, stats='x'), lambda n: FewShotClassifier(n, stats=([.5]*3, [0, 1, 1])),
                                  lambda n: FewShotClassifier(n, px=True),
                                  lambda n: FewShotClassifier(n).fit([np.zeros((9, 9, 3), np.uint8)]*2, [['a'], ['b']]),
                                  lambda n: FewShotClassifier(n).embed(None),
                                  lambda n: FewShotClassifier(n).embed(np.zeros((0, 0, 3), np.uint8)),
                                  lambda n: few_shot_data('demo', seed=-1), lambda n: few_shot_data(5), lambda n: prepare('x', None)])
def test_more_arguments_that_cannot_be(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    says(lambda: call(create_backbone('convnet4', 0)))
