"""Networks of experiments: trained once, shared by rows, seeds and processes, stopped and continued."""
import json
import threading

import numpy as np
import pytest
from helpers import ROWS, net_weights
from safetensors.torch import load_file

from grdd_fastai.experiments.store import NetworkStore
from grdd_fastai.experiments.table import EL, GR, table
from grdd_fastai.stage_one import StageOne
from grdd_fastai.stage_two import StageTwo


def test_stage_one_is_trained_once_for_all_rows_and_experiments(small, tmp_path):
    rows = ROWS | {'self': GR | dict(phi='student')}
    table('a', rows, out=tmp_path, **small)
    first = net_weights(tmp_path)
    assert sorted(name.split('-')[0] for name in first) == ['cl','cl','el','gr','gr']
    times = {p:p.stat().st_mtime_ns for p in tmp_path.glob('*/net.safetensors')}
    table('b', rows, out=tmp_path, **small)
    assert {p:p.stat().st_mtime_ns for p in tmp_path.glob('*/net.safetensors')} == times

def test_a_row_comes_to_the_same_bits_alone_and_among_others(small, tmp_path):
    table('a', ROWS, out=tmp_path/'a', **small)
    table('b', {'GRDD':ROWS['GRDD']}, out=tmp_path/'b', **small)
    a,b = net_weights(tmp_path/'a'),net_weights(tmp_path/'b')
    assert b.items() < a.items() and any(k.startswith('gr') for k in b)

def test_stopped_after_every_step_it_comes_to_the_same_bits(small, tmp_path, capsys):
    small,sessions = small | dict(episodes=5),0
    table('a', ROWS, out=tmp_path/'a', **small)
    capsys.readouterr()
    while True:
        scored = table('a', ROWS, out=tmp_path/'b', max_minutes=1e-9, **small).scored
        sessions += 1
        said = json.loads(capsys.readouterr().out) # the result alone
        assert (said['status'] == 'finished') == (len(scored) == 3)
        if len(scored) == 3: break
    assert 8 < sessions < 20 and net_weights(tmp_path/'a') == net_weights(tmp_path/'b')

def test_seeds_of_stage_two_alone_share_one_stage_one(small, tmp_path):
    made = table('a', ROWS, out=tmp_path, results=tmp_path/'results', seeds='0,1,2', stage_one_seed=1, **small)
    assert (sorted(n.rsplit('-', 1)[0] for n in net_weights(tmp_path))
            == ['cl-convnet4-s1', 'cl-convnet4_128-s0', *(f'{k}-convnet4-s{i}' for k in ('el','gr') for i in range(3))])
    records = [json.loads(p.read_text()) for p in (tmp_path/'results').glob('*/*.json')]
    assert len(made.scored) == len(records) == 7 and [r['seed'] for r in records if r['row'] == 'CL'] == [1] # once
    d = made.pairs[(made.pairs.row == 'GRDD') & (made.pairs.versus == 'CL')].set_index('seed').difference
    of = {r['seed']:r['versus']['CL']['1-shot']['difference'] for r in records if r['row'] == 'GRDD'}
    assert sorted(of) == [0, 1, 2] and of == {seed:pytest.approx(d[seed], abs=1e-3) for seed in of}
    assert d['all'] == pytest.approx(np.mean([d[i] for i in range(3)]))

def test_other_settings_and_other_seeds_are_other_networks(data, tmp_path):
    store,record = NetworkStore(data, tmp_path),StageOne().recorded()
    a,b = (store.folder('cl', 'x', StageOne(**c).recorded()) for c in ({}, dict(lr=0.1)))
    assert a != b and a == store.folder('cl', 'x', dict(reversed(record.items())))

def test_a_compiled_network_goes_to_the_same_folder(data, tmp_path):
    "Both stages are compiled by a backend that records each graph and runs it unchanged"
    def names(compile):
        store = NetworkStore(data, tmp_path/str(bool(compile)), compile=compile)
        cl = store.stage_one_net(StageOne(arch='convnet4', epochs=1, rotation=False))
        return [cl.folder.name, store.stage_two_net(cl, cl, StageTwo(n_way=3, n_query=2, n_episodes=3, epochs=1)).folder.name]
    graphs = []
    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward
    assert names(dict(backend=backend)) == names(False) and len(graphs) >= 4 # one for training and one for evaluation in each stage

def test_episodic_labels_do_not_depend_on_the_distillations_settings(small, tmp_path):
    table('a', {'x':EL, 'y':EL | dict(stage_two=dict(T=9., gamma=9., decouple=False)), 'z':EL | dict(stage_two=dict(scale=9.))},
          out=tmp_path, **small)
    assert len([n for n in net_weights(tmp_path) if n.startswith('el')]) == 2

def test_equal_architectures_share_whatever_their_roles_are_called(small, tmp_path):
    _,_,nets,_,_ = table('a', {'GRDD':GR}, out=tmp_path, seeds='0,1', **small | dict(teacher='convnet4'))
    assert all(nets['GRDD', s]['teacher'].folder == nets['GRDD', s]['student'].folder for s in (0, 1))

def test_two_processes_share_what_one_trains(small, tmp_path):
    "Both are at work in one folder: the same result in both, every network trained once"
    out = {}
    def work(name): out[name] = table(name, ROWS, out=tmp_path, **small | dict(episodes=5)).scored
    threads = [threading.Thread(target=work, args=(n,)) for n in 'ab']
    for t in threads: t.start()
    for t in threads: t.join()
    assert out['a'].equals(out['b']) and len(net_weights(tmp_path)) == 4

def test_a_term_that_trains_layers_comes_to_the_same_bits_after_stops(small, tmp_path):
    small,rows,sessions = small | dict(episodes=8),{'x':GR | dict(stage_two=dict(kd_weight=1., regression_weight=1.))},0
    table('a', rows, out=tmp_path/'a', **small)
    while not len(table('a', rows, out=tmp_path/'b', max_minutes=1e-9, **small).scored): sessions += 1
    student, = (k for k in net_weights(tmp_path/'a') if k.startswith('gr'))
    assert sessions > 3 and net_weights(tmp_path/'a') == net_weights(tmp_path/'b')
    assert not [k for k in load_file(tmp_path/'a'/student/'net.safetensors') if 'heads' in k or 'backbone' in k] # the student alone

def test_a_moving_average_comes_to_the_same_bits_after_stops(small, tmp_path):
    "In both stages; without it the weights are others"
    small = small | dict(episodes=8)
    def rows(**ema): return {'x':GR | dict(phi='student', stage_one=dict(bs=16) | ema, stage_two=ema)}
    table('a', rows(ema_decay=.9), out=tmp_path/'a', **small)
    while not len(table('a', rows(ema_decay=.9), out=tmp_path/'b', max_minutes=1e-9, **small).scored): pass
    table('a', rows(), out=tmp_path/'c', **small)
    a,b,c = (net_weights(tmp_path/f) for f in 'abc')
    assert len(a) == len(c) == 2 and a == b and not set(a.values()) & set(c.values())
