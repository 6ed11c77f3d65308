"""Methods side by side: what each trains on, the same episodes for all, records, and one line for a method of one's own."""
import json
import re
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import net_weights, recipe, says
from safetensors.torch import load_file

import grdd_fastai.experiments.store as store
from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.experiments.comparison import ONE, PROTOCOLS, TWO, Comparison, compare_methods
from grdd_fastai.experiments.report.methods import HOW, comparison
from grdd_fastai.experiments.store import NetworkStore, Protocol
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.methods.catalogue import METHODS, Distilled, Episodic, Transfer, described
from grdd_fastai.methods.episodic import ANIL, ProtoNet
from grdd_fastai.methods.transfer import BornAgain, ManifoldMixup
from grdd_fastai.models.pretrained import load_network
from grdd_fastai.runs.provenance import of_class

IMAGES = 600

@pytest.fixture
def words(faint, cache, monkeypatch):
    "Few images, few episodes, also of those that choose the epoch"
    monkeypatch.setattr(store, 'EPISODE', store.EPISODE | dict(n_episodes=20))
    return dict(data=str(faint), cache=str(cache), px=16, images=IMAGES, test_episodes=40, shots='1,2', teacher='convnet4.grdd_cifarfs')

def few(*names, **more):
    "Some of the methods, with short epochs"
    def short(m):
        taught = isinstance(m, Distilled) and m.teacher
        return replace(m, settings=dict(m.settings) | dict(n_episodes=2) | (dict(views=2) if taught else {}))
    return {k:m if not hasattr(m, 'of_shot') else short(m) for k,m in (METHODS | more).items() if k in names or k in more}

def test_every_method_trains_and_is_scored(words, tmp_path):
    known = few(*METHODS)
    words |= dict(images=200, shots='1')
    t = compare_methods('all', **words, out=str(tmp_path), results=str(tmp_path/'r'), known=known)['own']
    assert list(t.method) == list(METHODS) and t.accuracy.between(0, 100).all()
    assert pd.read_csv(tmp_path/'compare_own_val_200_convnet4.grdd-cifarfs.csv').accuracy.tolist() == pytest.approx(t.accuracy.tolist())
    assert (tmp_path/'compare_own_val_200_convnet4.grdd-cifarfs.png').stat().st_size > 5000
    # one network for three methods that differ in the classifier alone
    made = {r['method']:r['networks'] for r in records(tmp_path/'r')}
    assert len({made[k]['net']['run'] for k in ('baseline', 'simpleshot', 'rfs_simple')}) == 1
    # equal cost, up to whole epochs
    data = few_shot_data(words['data'], px=16, cache=words['cache'])
    lab = Comparison(NetworkStore(data, tmp_path), METHODS, 'convnet4', 100_000)
    assert all(abs(m.images(lab)/m.length - 100_000) < 20_000 for m in METHODS.values())

def test_a_line_that_cannot_be_trained_is_a_sentence_before_anything_is(words, tmp_path):
    def refused(word, name='mine', more=METHODS, **line):
        known = {name:line.pop('line')} if 'line' in line else more
        says(lambda: compare_methods(name, **words, out=str(tmp_path), known=METHODS | known), word)
        assert not net_weights(tmp_path)
    refused('subclass of EpisodicMethod', line=Episodic(title='Mine', make=lambda net: ProtoNet(net)))
    refused('rfs_simpel', line=Episodic(title='Mine', make=ProtoNet, start='rfs_simpel'))
    refused('ema_decay', line=Episodic(title='Mine', make=ProtoNet, settings=dict(ema_decay=.9)))
    refused('leave teacher out', line=Episodic(title='Mine', make=ProtoNet, teacher='given'))
    refused('network for each shot', line=Transfer(title='Mine', start='protonet'))
    refused('needs a teacher', line=Transfer(title='Mine', terms={BornAgain:{}}))
    refused('cannot be made', line=Transfer(title='Mine', terms={ManifoldMixup:dict(beta=1)}))
    refused("no setting 'learning_rate'", line=Transfer(title='Mine', settings=dict(learning_rate=1)))
    refused("unknown classifier 'nearest'", line=Transfer(title='Mine', classifier='nearest'))
    refused('give it a length', line=Transfer(title='Mine', settings=dict(epochs=40)))
    refused('kd_weight of Mine has no effect', line=Distilled(title='Mine', teacher=None, settings=dict(kd_weight=5.)))
    refused('leave init out', line=Distilled(title='Mine', settings=dict(init='cl')))
    refused('leave start out', line=Distilled(title='Mine', start='cl'))
    words = words | dict(teacher=None)
    refused('--teacher', line=Episodic(title='Mine', make=ProtoNet, start='grdd'))

def test_settings_of_a_class_and_code_of_ones_own_make_another_network(data, tmp_path):
    store = NetworkStore(data, tmp_path)
    def folder(method): return of_class(method)
    assert folder(partial(ANIL, lr=.1)) != folder(partial(ANIL, lr=.5)) and folder(ANIL)['own'] == dict(n_way=5, steps=5, lr=.5)
    assert 'code' not in folder(ANIL) and store.data is data
    assert described(BornAgain, dict(T=2.)) == vars(BornAgain(T=2.))
    class A(ProtoNet):
        def logits(self, support, support_y, query): return -super().logits(support, support_y, query)
    class B(ProtoNet):
        def logits(self, support, support_y, query): return super().logits(support, support_y, query)
    assert folder(A)['code'] != folder(B)['code']
    class Mine(BornAgain):
        def after_loss(self): pass
    assert described(Mine, {}).keys() == {'code', *vars(BornAgain())}

def test_shots_that_are_scored_one_after_the_other_share_a_record(words, tmp_path):
    known = few('labels', 'protonet')
    how = dict(versus='labels', known=known, out=str(tmp_path), results=str(tmp_path/'r'))
    for shots in ('1', '2'): compare_methods('all', **words | dict(shots=shots), **how)
    apart = {r['method']:r for r in records(tmp_path/'r')}
    compare_methods('all', **words, **how)
    both = {r['method']:r for r in records(tmp_path/'r')}
    for k in known:
        assert apart[k].keys() == both[k].keys() and len(records(tmp_path/'r')) == 2
        for part in ('scores', 'versus', 'images'): assert apart[k][part] == both[k][part], (k, part)
    (tmp_path/'r'/'compare'/'copy.json').write_text(json.dumps(both['labels'] | dict(file='copy.json')))
    shutil.copytree(tmp_path/'r', tmp_path/'root'/'results')
    says(lambda: comparison(tmp_path/'root'), 'not seeds of one training')

def test_without_versus_the_first_method_is_compared_with_and_a_named_one_is_trained(words, tmp_path):
    known = few('labels', 'protonet')
    compare_methods('labels,protonet', **words | dict(shots='1'), known=known, out=str(tmp_path))
    pairs, = tmp_path.glob('compare_own_val_*_pairs.csv')
    assert pd.read_csv(pairs).versus.tolist() == ['labels']
    t = compare_methods('labels', **words | dict(shots='1'), versus='protonet', known=known, out=str(tmp_path))['own']
    assert list(t.method) == ['labels', 'protonet']

def records(folder): return [json.loads(p.read_text()) for p in folder.glob('compare/*.json')]

def test_scores_are_those_of_the_saved_networks_on_the_same_episodes(words, tmp_path):
    known = few('protonet', 'labels', 'rfs_simple')
    tables = compare_methods('all', **words, versus='labels', protocols='own,logistic,views,transductive', out=str(tmp_path), known=known,
                             results=str(tmp_path/'r'))
    data = few_shot_data(words['data'], px=16, cache=words['cache'])
    lab = Comparison(NetworkStore(data, tmp_path), known, 'convnet4', IMAGES, ONE, TWO)
    net = lab.network('rfs_simple', 0, 1).net
    h,y = embed(net, plain_dl(data, 'val'))
    want = evaluate(h, y, 5, 2, 15, 40, seed=1, classifier='logistic')
    other = evaluate(h, y, 5, 2, 15, 40, seed=1, classifier='tim_adm')
    for protocol,e in dict(logistic=want, transductive=other).items():
        t = tables[protocol].set_index(['method', 'shot'])
        assert t.accuracy['rfs_simple', 2] == pytest.approx(e.accuracy, abs=1e-6), protocol
    views = tables['views'].set_index(['method', 'shot']).accuracy['rfs_simple', 2]
    assert views != pytest.approx(want.accuracy) and set(tables['views'].classifier) == {'logistic, 5 views'}
    assert tables['own'].set_index(['method', 'shot']).accuracy['rfs_simple', 2] == views # as in RFS
    # the paired difference in the record is that of the episodes themselves
    mine,its = (lab.store.score(lab.network(k, 0, 2), 'val', 2, 40, Protocol(known[k].classifier)) for k in ('protonet', 'labels'))
    r = next(r for r in records(tmp_path/'r') if (r['method'], r['protocol']) == ('protonet', 'own'))
    assert r['versus']['labels']['2-shot']['difference'] == pytest.approx((mine.episodes - its.episodes).mean(), abs=1e-3)
    assert {'command', 'seed', 'settings', 'images', 'data', 'scored', 'source'} <= r.keys() and set(r['networks']) == {'1-shot', '2-shot'}

def test_the_whole_method_comes_back_from_the_disk(words, tmp_path):
    "Also the layers beside the backbone; the backbone alone is a network that loads by its folder"
    known = few('relationnet')
    data = few_shot_data(words['data'], px=16, cache=words['cache'])
    a,b = (Comparison(NetworkStore(data, tmp_path), known, 'convnet4', 100).network('relationnet', 0, 1) for _ in range(2))
    assert a.folder == b.folder and all(torch.equal(v, b.method.state_dict()[k]) for k,v in a.method.state_dict().items())
    assert any(k.startswith('relation.') for k in load_file(b.folder/'net_layers.safetensors'))
    net = load_network(b.folder)
    assert all(torch.equal(v, b.net.state_dict()[k]) for k,v in net.state_dict().items())
    (b.folder/'net_layers.safetensors').write_bytes(b'')
    says(lambda: Comparison(NetworkStore(data, tmp_path), known, 'convnet4', 100).network('relationnet', 0, 1), 'net_layers')

def test_stopped_at_every_step_it_comes_to_the_same_bits(words, tmp_path, capsys):
    known = few('meta_baseline', 'rfs_distill', 'rfs_simple', 's2m2', 'skd0')
    names,one = 'meta_baseline,rfs_distill,s2m2',words | dict(shots='1')
    compare_methods(names, **one, out=str(tmp_path/'a'), versus='rfs_distill', known=known)
    sessions = 0
    while True:
        found = compare_methods(names, **one, out=str(tmp_path/'b'), versus='rfs_distill', known=known, max_minutes=1e-9)
        sessions += 1
        if len(found.get('own', ())) == 3: break
    assert sessions > 8 and net_weights(tmp_path/'a') == net_weights(tmp_path/'b')

def test_a_method_of_ones_own_is_a_class_and_a_line(words, tmp_path):
    class Farthest(ProtoNet):
        def logits(self, support, support_y, query): return -super().logits(support, support_y, query)
    known = few('protonet', farthest=Episodic(title='the farthest class', make=Farthest, settings=dict(lr=1e-9, opt='sgd')),
                nearest=Episodic(title='the nearest class', make=ProtoNet, settings=dict(lr=1e-9, opt='sgd')))
    t = compare_methods('farthest,nearest', **words, out=str(tmp_path), versus='nearest', known=known)['own'].set_index(['method', 'shot'])
    assert t.accuracy['farthest', 1] < 20 < t.accuracy['nearest', 1] # the same random network, read in two ways

def test_a_method_may_be_in_a_file_of_ones_own(words, tmp_path, monkeypatch):
    "A class, or a line; changed code is another network"
    monkeypatch.setattr('grdd_fastai.experiments.comparison.TWO', TWO.but(n_episodes=2))
    def write(sign): (tmp_path/f'mine{sign}.py').write_text(f'''
from grdd_fastai.runs.provenance import of_class
from grdd_fastai.methods.catalogue import Episodic
from grdd_fastai.methods.episodic import ProtoNet
class Mine(ProtoNet):
    def logits(self, support, support_y, query): return {sign}1*super().logits(support, support_y, query)
line = Episodic(title='a line', make=Mine, settings=dict(lr=1e-9, opt='sgd'))
broken = 1
''')
    out,one = tmp_path/'out',words | dict(shots='1')
    for sign in '+-': write(sign)
    t = compare_methods(f'{tmp_path}/mine+.py:Mine,labels', **one, out=str(out), known=few('labels'))['own']
    assert list(t.method) == ['Mine', 'labels'] and t.title.iloc[0] == 'Mine'
    accuracies = [compare_methods(f'{tmp_path}/mine{s}.py:line', **one, out=str(out))['own'].accuracy.iloc[0] for s in '+-']
    assert accuracies[1] < 20 < accuracies[0] # the same random network, read in two ways
    for name in ('broken', 'nothing'): says(lambda name=name: compare_methods(f'{tmp_path}/mine+.py:{name}', **one, out=str(out)), name)
    says(lambda: compare_methods(f'{tmp_path}/none.py:Mine', **one, out=str(out)), 'none.py')

def test_seeds_and_chains(words, tmp_path):
    known = few('skd0', 's2m2')
    t = compare_methods('s2m2', **words | dict(shots='1'), seeds='0,1', versus='skd0', out=str(tmp_path), known=known)['own']
    assert list(t.method) == ['s2m2', 's2m2', 'skd0', 'skd0'] and list(t.seed) == [0, 1]*2 and len(net_weights(tmp_path)) == 4
    assert list(t.images_with_others > t.images) == [True, True, False, False]
    started = [json.loads((f/'settings.json').read_text())['settings'] for f in tmp_path.iterdir() if (f/'settings.json').exists()]
    assert sorted(s['start']['seed'] for s in started if 'start' in s) == [0, 1]

def test_each_protocol_has_its_words_and_differs_from_the_others():
    assert HOW.keys() == PROTOCOLS.keys()
    made = [p.slug() for p in PROTOCOLS.values() if p]
    assert len(set(made)) == len(made) and Protocol().slug() == ''

def test_what_cannot_be_is_a_sentence(words, tmp_path):
    out = dict(out=str(tmp_path))
    says(lambda: compare_methods('protonets', **words, **out), 'protonets')
    says(lambda: compare_methods('grdd', **words | dict(teacher=None), **out), '--teacher')
    says(lambda: compare_methods('grdd', **words | dict(teacher='/no/net'), **out), "--teacher is '/no/net'")
    says(lambda: compare_methods('protonet', **words, **out, arch='convnet4.grdd_cifarfs'), 'leave its tag out')
    says(lambda: compare_methods('', **words, **out), "--methods is ''")
    says(lambda: compare_methods('protonet', **words, **out, protocols='best'), 'best')
    says(lambda: compare_methods('protonet', **words, **out, versus='best'), '--versus')
    says(lambda: compare_methods('protonet', **words, **out, seeds='a'), 'seeds')
    says(lambda: compare_methods('protonet', **words, **out, protocols='own,dirichlet'), '75 query') # of one class at most
    assert not any(tmp_path.iterdir())

def test_the_report_has_a_table_for_each_protocol_and_budget(words, tmp_path):
    "Cells repeat the records, rows are sorted by accuracy, and a difference is bold if the intervals of all seeds agree in sign"
    known = few('protonet', 'labels', 'rfs_simple')
    how = dict(versus='labels', protocols='own,cosine', known=known, results=str(tmp_path/'results'))
    tables = compare_methods('all', **words | dict(images=200), **how, seeds='0,1', out=str(tmp_path))
    compare_methods('labels', **words | dict(images=100), **how, out=str(tmp_path))
    text = '\n'.join(comparison(tmp_path))
    heads = [line for line in text.splitlines() if line.startswith('## ')]
    assert [re.search('[0-9]+ images|length', line)[0] for line in heads] == ['200 images', '100 images', 'length']
    assert [line.split('`')[1] for line in text.split(heads[2])[1].splitlines() if line.startswith('| `')] == ['labels'] # alone has both
    assert text.count(f'<summary>{HOW["cosine"].capitalize()}</summary>') == 2 and text.count(f'{HOW["own"].capitalize()}.') == 2
    first = text.split('## ')[1]
    t = tables['own'][tables['own'].shot == 1]
    means = t.groupby('method').accuracy.mean().sort_values(ascending=False)
    lines = [line for line in first.split('<details')[0].splitlines() if line.startswith('| `')]
    assert [line.split('`')[1] for line in lines] == list(means.index)
    for line,name in zip(lines, means.index, strict=True):
        cells = line.split(' | ')
        assert cells[4].startswith(f'{means[name]:.2f} (sd ') and line.count('](results/compare/') == 2
        if name == 'labels': continue
        of = [r['versus']['labels']['1-shot'] for r in records(tmp_path/'results') if (r['method'], r['protocol']) == (name, 'own')]
        clear = {d['clear'] for d in of} in ({1}, {-1})
        assert f"{np.mean([d['difference'] for d in of]):+.2f}" in cells[5] and cells[5].startswith('**') == clear

def test_the_report_mixes_no_networks_and_no_teachers(words, tmp_path):
    known = few('protonet', 'labels')
    out = dict(known=known, out=str(tmp_path), results=str(tmp_path/'results'), versus='labels')
    compare_methods('all', **words | dict(images=200, shots='1'), **out)
    def lines():
        text = '\n'.join(comparison(tmp_path))
        return {line.split('`')[1]:line.split(' | ') for line in text.splitlines() if line.startswith('| `')}
    assert ' ± ' in lines()['protonet'][5]
    by_name = {r['method']:r for r in records(tmp_path/'results')}
    def change(name, **new): (tmp_path/'results'/'compare'/by_name[name]['file']).write_text(json.dumps(by_name[name] | new))
    other = by_name['labels']['networks']['net'] | dict(weights='f'*64)
    change('labels', networks=dict(net=other)) # a new network; the difference from the former one is not shown
    assert lines()['protonet'][5] == '' and ' ± ' in lines()['protonet'][4]
    change('labels', given=by_name['labels']['given'] | dict(weights='0'*16))
    says(lambda: comparison(tmp_path), 'teachers of the same name')

def test_another_weight_is_a_row_of_its_own(words, tmp_path):
    recipe('term_weights')('rkd_12.5', **words | dict(shots='1'), versus='rkd_12.5', out=str(tmp_path))
    run, = tmp_path.glob('gr-*/settings.json')
    s = json.loads(run.read_text())['settings']
    assert (s['rkd_weight'], s['kl_weight']) == (12.5, 0)

def test_a_method_that_fails_leaves_the_others_their_turn(words, tmp_path):
    known = few('labels', 'protonet')
    known['anil'] = replace(METHODS['anil'], settings=dict(n_way=6, n_episodes=2)) # validation is 5-way, and so is its head
    says(lambda: compare_methods('anil,labels', **words, out=str(tmp_path), versus='labels', known=known), '1 of the methods failed')
    assert np.isfinite(pd.read_csv(tmp_path/f'compare_own_val_{IMAGES}_convnet4.grdd-cifarfs.csv').accuracy).all()
