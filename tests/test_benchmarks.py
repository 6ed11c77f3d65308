"""The benchmarks run and print what they say; their figures are for an idle machine to give."""
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

SMALL = dict(
    train_step=['--repeats', '1', '--archs', 'convnet4', '--sides', '16', '--step', '0.2'],
    data=['--repeats', '1', '--sides', '16'],
    scaling=['--images', '600', '--episodes', '200'],
    peers=['--repeats', '1', '--episodes', '2'],
    processes=['--seeds', '2', '--epochs', '1', '--episodes', '4', '--test-episodes', '100'])

pytestmark = pytest.mark.slow

def lines(name, tmp_path):
    done = subprocess.run([sys.executable, ROOT/'benchmarks'/f'{name}.py', *SMALL[name], '--out', tmp_path/'out.json'],
                          capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=str(ROOT), PYTHONWARNINGS='ignore'), timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    kept = json.loads((tmp_path/'out.json').read_text())
    assert kept['lines'] == found and kept['device'] and kept['versions']['torch'] and kept['command'].startswith('python ')
    return found


def test_train_step(tmp_path):
    found = lines('train_step', tmp_path)
    assert ([(o['name'], o['stage'], o['px'], o['device']) for o in found if 'ratio' in o]
            == [('convnet4', 'one', 16, 'cpu'), ('convnet4', 'two', 16, 'cpu')])
    assert all(o['ratio'] == pytest.approx(o['bare_ms']/o['recipe_ms'], abs=.02) for o in found if 'ratio' in o)
    assert found[-1]['speedup'] > 0 and 'ratio' not in found[-1] and len(found) == 3

def test_data(tmp_path): assert len(found := lines('data', tmp_path)) == 8 and all(o['images_per_second'] > 0 for o in found)

def test_scaling(tmp_path):
    found = lines('scaling', tmp_path)
    assert ([o['name'] for o in found] == ['prepare', 'train', 'embed'] + ['evaluate']*4
            and all(50 < o['anonymous_mb'] < 4000 for o in found))

def test_peers(tmp_path): assert [o['name'] for o in lines('peers', tmp_path)] == ['episode loaded', 'training step with loading']

def test_processes(tmp_path):
    found = lines('processes', tmp_path)
    assert ([(o['name'], o.get('processes', o.get('episodes_a_step'))) for o in found]
            == [('stage one', 1), ('stage one', 2)] + [('stage two', k) for k in (1, 2, 2, 2, 4, 4, 4)])
    assert found[0]['difference'] == 0 and all(20 < o['accuracy'] < 100 and o['seeds'] == 2 for o in found)
