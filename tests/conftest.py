"""Fixtures that several files use: tiny data sets, the real one, networks and finished runs."""
import os
from pathlib import Path

import matplotlib
import pytest
from helpers import ROOT, STAGES, TABLE, leavings, recipe, settings, write_csv_set

from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.models.create import create_backbone
from grdd_fastai.models.pretrained import save_weights

matplotlib.use('Agg')
REAL = Path(os.environ.get('CIFAR_FS', ROOT.parent/'shared'/'data'/'cifar-fs.zip'))


# ---- data sets --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def csv_set(tmp_path_factory): return write_csv_set(tmp_path_factory.mktemp('set'))

@pytest.fixture(scope='session')
def faint(tmp_path_factory):
    "Split CSVs of classes that can hardly be told apart: no accuracy is 100%"
    return write_csv_set(tmp_path_factory.mktemp('faint'), amplitude=4)

@pytest.fixture
def root(tmp_path): return write_csv_set(tmp_path/'set', (3, 3, 3), 6, px=8)

@pytest.fixture
def folders(root):
    "The same images without CSVs: train, val and test folders of class folders"
    for s in ('train', 'val', 'test'):
        (root/f'{s}.csv').unlink()
        (root/s).mkdir()
        for d in (root/'images').glob(f'{s}[0-9]'): d.rename(root/s/d.name)
    return root

@pytest.fixture(scope='session')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')

@pytest.fixture(scope='session')
def data(csv_set, cache): return few_shot_data(csv_set, px=16, cache=cache)

@pytest.fixture(scope='session')
def faint_data(faint, cache): return few_shot_data(faint, 32, cache)

@pytest.fixture(scope='session')
def real_zip():
    if not REAL.exists(): pytest.skip(f'the real CIFAR-FS is not at {REAL} (set CIFAR_FS)')
    return REAL

@pytest.fixture(scope='session')
def real(real_zip, cache): return few_shot_data(real_zip, cache=cache)


# ---- networks and runs ------------------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def two_nets(tmp_path_factory, faint_data):
    "Weights of a network with a classifier and of one without, as runs save them"
    out = tmp_path_factory.mktemp('nets')
    for name,n,seed in (('student_cl', 6, 0), ('student_grdd', 0, 1)):
        save_weights(create_backbone('convnet4', n, 32, seed), out/name, arch='convnet4', px=32, classes=faint_data.train.vocab,
                     stats=faint_data.stats)
    return out

@pytest.fixture(autouse=True)
def no_pages(monkeypatch):
    "The runs of a test draw no page, which takes seconds; `finished_run` has one"
    monkeypatch.setattr('grdd_fastai.grdd.write_run_report', lambda out, *args: out/'report.html')

@pytest.fixture(scope='session')
def finished_run(csv_set, cache, tmp_path_factory):
    "The folder of a run that was never stopped; no test changes it"
    out = tmp_path_factory.mktemp('finished')/'run'
    recipe('cifarfs_5w1s')(out=str(out), **settings(csv_set, cache))
    return out

@pytest.fixture(scope='session')
def undisturbed(finished_run):
    "The results of a run that was never stopped, as `leavings` gives them"
    want = leavings(finished_run)
    assert set(want[0]) == {f'{s}.{x}' for s in STAGES for x in ('safetensors','json')} | {f'history_{s}.csv' for s in STAGES}
    return want

@pytest.fixture(scope='session')
def finished(finished_run):
    "The files of a finished run, from which a test makes a folder of its own"
    return {f.name:f.read_bytes() for f in finished_run.iterdir()}

@pytest.fixture
def small(faint, cache): return TABLE | dict(data=str(faint), cache=str(cache))
