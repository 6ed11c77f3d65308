"""Loggers follow a run: what they hold is what the run's own history says; a stop loses nothing; a missing package is one sentence."""
import sys

import numpy as np
import pandas as pd
import pytest
from helpers import SMALL, recipe, says

from grdd_fastai.runs.loggers import LOGGERS, MAKERS


def run(faint, cache, out, **kwargs):
    return recipe('cifarfs_5w1s')(data=str(faint), cache=str(cache), out=str(out), **SMALL | dict(epochs=2, teacher='convnet4') | kwargs)

def history(out, stage='student_cl'): return pd.read_csv(out/f'history_{stage}.csv')

def events(folder):
    "{name: values by step} of all files that TensorBoard has in a folder"
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator', reason='TensorBoard is not installed')
    found = accumulator.EventAccumulator(str(folder), size_guidance=dict(scalars=0))
    found.Reload()
    return {tag:[e.value for e in found.Scalars(tag)] for tag in found.Tags()['scalars']}

def test_tensorboard_and_csv_hold_what_the_history_holds(faint, cache, tmp_path):
    pytest.importorskip('tensorboard', reason='TensorBoard is not installed')
    run(faint, cache, tmp_path/'run', log='tensorboard,csv')
    for stage in ('student_cl', 'student_grdd'):
        want = history(tmp_path/'run', stage)
        found = events(tmp_path/'run'/'tensorboard'/stage)
        assert np.allclose(found['accuracy'], want.accuracy) and np.allclose(found['valid_loss'], want.valid_loss)
        table = pd.read_csv(tmp_path/'run'/f'log_{stage}.csv')
        assert np.allclose(table.accuracy, want.accuracy) and np.allclose(table.train_loss, want.train_loss)

def test_loggers_change_nothing(faint, cache, tmp_path):
    a,b = (run(faint, cache, tmp_path/f'{log}', log=log) for log in (None, 'csv'))
    assert a['weights'] == b['weights'] and a['accuracy'] == b['accuracy']

def test_a_run_that_was_stopped_logs_on(faint, cache, tmp_path):
    pytest.importorskip('tensorboard', reason='TensorBoard is not installed')
    run(faint, cache, tmp_path/'run', log='tensorboard', max_minutes=1e-9)
    assert run(faint, cache, tmp_path/'run', log='tensorboard', resume=True)['status'] == 'finished'
    assert np.allclose(events(tmp_path/'run'/'tensorboard'/'student_cl')['accuracy'], history(tmp_path/'run').accuracy)

def test_wandb_without_a_login_writes_beside_the_run(faint, cache, tmp_path, monkeypatch):
    pytest.importorskip('wandb', reason='Weights & Biases is not installed')
    for name in ('WANDB_MODE', 'WANDB_API_KEY'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    run(faint, cache, tmp_path/'run', log='wandb')
    assert len(list((tmp_path/'run'/'wandb').glob('offline-run-*/*.wandb'))) == 2 # a run for each stage

def test_unknown_and_missing_loggers_are_one_sentence(faint, cache, tmp_path, monkeypatch):
    says(lambda: run(faint, cache, tmp_path/'a', log='tensorbored'), '--log', 'tensorboard, wandb, csv')
    assert set(LOGGERS) == MAKERS.keys()
    monkeypatch.setitem(sys.modules, 'wandb', None)
    says(lambda: run(faint, cache, tmp_path/'b', log='wandb'), "pip install 'grdd_fastai[loggers]'")
    assert run(faint, cache, tmp_path/'b', resume=True)['status'] == 'finished'
