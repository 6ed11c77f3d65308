"""The benchmarks run and print what they say; their figures are for an idle machine to give."""
import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from fastai.test_utils import synth_learner
from helpers import ROOT, fit

SMALL = dict(
    train_step=['--repeats', '1', '--archs', 'convnet4', '--sides', '16', '--step', '0.2'],
    data=['--repeats', '1', '--sides', '16'],
    scaling=['--images', '600', '--episodes', '200'],
    peers=['--repeats', '1', '--episodes', '2'],
    processes=['--seeds', '2', '--epochs', '1', '--episodes', '4', '--test-episodes', '100'],
    gpu=['--archs', 'convnet4', '--sides', '32', '--repeats', '1', '--step', '0.1', '--steps', '5', '--images', '1280',
         '--modes', 'no'])

def lines(name, tmp_path):
    done = subprocess.run([sys.executable, ROOT/'benchmarks'/f'{name}.py', *SMALL[name], '--out', tmp_path/'out.json'],
                          capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=str(ROOT), PYTHONWARNINGS='ignore'), timeout=500)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    kept = json.loads((tmp_path/'out.json').read_text())
    assert kept['lines'] == found and kept['device'] and kept['versions']['torch'] and kept['command'].startswith('python ')
    return found


@pytest.mark.slow
def test_train_step(tmp_path):
    found = lines('train_step', tmp_path)
    assert ([(o['name'], o['stage'], o['px'], o['device']) for o in found if 'ratio' in o]
            == [('convnet4', 'one', 16, 'cpu'), ('convnet4', 'two', 16, 'cpu')])
    assert all(o['ratio'] == pytest.approx(o['bare_ms']/o['recipe_ms'], abs=.02) for o in found if 'ratio' in o)
    assert found[-1]['speedup'] > 0 and 'ratio' not in found[-1] and len(found) == 3

@pytest.mark.slow
def test_data(tmp_path): assert len(found := lines('data', tmp_path)) == 8 and all(o['images_per_second'] > 0 for o in found)

@pytest.mark.slow
def test_scaling(tmp_path):
    found = lines('scaling', tmp_path)
    assert ([o['name'] for o in found] == ['prepare', 'train', 'embed'] + ['evaluate']*4
            and all(50 < o['anonymous_mb'] < 4000 for o in found))

@pytest.mark.slow
def test_peers(tmp_path): assert [o['name'] for o in lines('peers', tmp_path)] == ['episode loaded', 'training step with loading']

@pytest.mark.slow
def test_processes(tmp_path):
    found = lines('processes', tmp_path)
    assert ([(o['name'], o.get('processes', o.get('episodes_a_step'))) for o in found]
            == [('stage one', 1), ('stage one', 2)] + [('stage two', k) for k in (1, 2, 2, 2, 4, 4, 4)])
    assert found[0]['difference'] == 0 and all(20 < o['accuracy'] < 100 and o['seeds'] == 2 for o in found)

@pytest.mark.slow
def test_gpu(tmp_path):
    "On a CPU, of which it speaks; without a GPU there are neither its memory nor synchronisations"
    found = lines('gpu', tmp_path)
    by_name = {o['name']:o for o in found}
    assert ([o['name'] for o in found] == ['step ratio']*2 + ['synchronisations']*2 + ['compiled', 'resume', 'whole recipe']
            and all(o['device'] == 'cpu' and 'error' not in o for o in found))
    assert [o['stage'] for o in found[:4]] == ['one', 'two']*2 and by_name['step ratio']['peak_mb'] is None
    assert by_name['synchronisations']['per_step'] is None
    assert found[4]['compile'] == 'no' and found[4]['step_ms'] > 0
    assert by_name['resume']['same'] is True and by_name['resume']['repeats'] is True
    whole = by_name['whole recipe']
    assert whole['student_steps'] == 90*1280//16 and whole['meta_steps'] == 15*400 # default_bs of so few images is 16
    parts = ('student', 'meta', 'validation', 'checkpoints', 'scoring')
    assert whole['seconds'] == pytest.approx(sum(whole[f'{k}_s'] for k in parts), abs=1)


# ---- parts of benchmarks ----------------------------------------------------------------------------------------------

@pytest.fixture
def module(monkeypatch):
    "A function that imports a benchmark by its name"
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    return importlib.import_module

def test_turns_of_fast_steps_fit_into_the_epoch(module):
    asked = []
    turns = module('train_step').Turns(lambda k: asked.append(k) or 1., repeats=5, least=1000.)
    learn = synth_learner(n_trn=23, cbs=turns)
    learn.dls.device = torch.device('cpu')
    fit(learn)
    assert len(turns.mine) == 5 and turns.others == [1.]*5 and asked == [4]*6 # after the first three steps there are 20

def test_gpu_goes_on_after_an_error_names_it_and_exits_with_1(module, tmp_path, monkeypatch, capsys):
    gpu,common = module('gpu'),module('common')
    def compiled(arch, px, compile, step, steps):
        if compile == 'reduce-overhead': raise ValueError('the first line\nthe second')
        return dict(step_ms=1.)
    monkeypatch.setattr(common, 'LINES', [])
    monkeypatch.setattr(gpu, 'in_own_process', common.attempt)
    monkeypatch.setattr(gpu, 'compiled', compiled)
    monkeypatch.setattr(gpu, 'resume', resume := lambda arch, px: dict(same=True))
    resume.__name__ = 'resume'
    with pytest.raises(SystemExit) as e: gpu.main(archs='convnet4', sides='32', only='compiled,resume', out=str(tmp_path/'out.json'))
    assert e.value.code == 'not measured: compiled' # Python prints a text on stderr and exits with 1
    said = capsys.readouterr()
    found = [json.loads(line) for line in said.out.splitlines()]
    assert [o.get('error') for o in found] == [None, None, 'ValueError: the first line', None] and found[2]['compile'] == 'reduce-overhead'
    assert json.loads((tmp_path/'out.json').read_text())['lines'] == found
    assert gpu.GPU or 'no NVIDIA GPU' in said.err

def test_a_process_that_dies_is_an_error_too(module):
    assert module('common').in_own_process(os._exit, 3)['error'].startswith('BrokenProcessPool')

def test_a_run_that_differs_is_not_the_same(module, monkeypatch):
    gpu = module('gpu')
    monkeypatch.setattr(gpu, 'both_stages', lambda arch, px, stops=(): stops)
    assert gpu.resume('convnet4', 32) == dict(same=False, repeats=True)
