"""Launchers of several processes: what is joined, and a sentence where nothing can be."""
import subprocess
import sys

import pytest
from helpers import ROOT, launch

from grdd_fastai.core.distributed import check_launch, processes
from grdd_fastai.core.errors import UserError


@pytest.mark.parametrize('env, says', [
    (dict(ACCELERATE_USE_CPU='True', MASTER_ADDR='127.0.0.1'), 'accelerate launch --cpu started one process'),
    (dict(OMPI_COMM_WORLD_SIZE='2'), 'mpirun started'),
    (dict(ACCELERATE_USE_CPU='True'), None), (dict(ACCELERATE_USE_CPU='True', MASTER_ADDR='127.0.0.1', WORLD_SIZE='2'), None)])
def test_a_launcher_that_does_not_start_what_it_says(env, says):
    if says is None: return check_launch(env)
    with pytest.raises(UserError, match=says): check_launch(env)

def test_without_accelerate_there_is_a_sentence(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    with pytest.raises(UserError, match='grdd-fastai.distributed'), processes(): pass

@pytest.mark.slow
def test_accelerate_launch_on_the_cpu_says_how(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'accelerate.commands.accelerate_cli', 'launch', '--cpu', '--num_processes', '2',
                           '--num_machines', '1', '--mixed_precision', 'no',
                           '--dynamo_backend', 'no', str(ROOT/'recipes'/'cifarfs_5w1s.py'), '--demo', '--out', str(tmp_path/'run')],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and '--multi_gpu --num_processes 2' in done.stderr and not (tmp_path/'run').exists()

@pytest.mark.slow
def test_a_user_error_in_two_processes_is_one_sentence(tmp_path):
    done = launch(ROOT/'recipes'/'cifarfs_5w1s.py', '--data', tmp_path/'nothing', '--out', tmp_path/'out')
    assert done.returncode != 0 and 'no such file or folder' in done.stderr
