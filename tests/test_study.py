"""Experiments as rows of settings: networks shared and trained once, stopped and continued, scored on the same episodes, recorded."""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_rel
from test_recipes import recipe

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.experiments.store import Study
from grdd_fastai.experiments.table import CL, EL, GR, table
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.fewshot.stats import Difference, Evaluation, compare, over_seeds
from grdd_fastai.stages import READINGS, STAGE_ONE, stage_two, stage_two_settings

SMALL = dict(student='convnet4', teacher='convnet4_128', epochs=1, teacher_epochs=1, schedule='one_cycle', lr=0.1,
             rotation=False, meta_epochs=1,
             episodes=2, test_episodes=40)
ROWS = {'CL':CL, 'CL+EL':EL | dict(versus=['CL']),
        'GRDD':GR | dict(versus=['CL','CL+EL'], paper={('faint0', 'convnet4_128', 'convnet4'):{'1-shot':69.3}})}

@pytest.fixture
def small(faint, cache): return SMALL | dict(data=str(faint), cache=str(cache))

def weights(out): return {p.parent.name:p.read_bytes() for p in out.glob('*/net.safetensors')}


# ---- differences ------------------------------------------------------------------------------------------------------

def test_difference_is_scipys_paired_test():
    rng = np.random.default_rng(0)
    a,b = rng.normal(60, 10, 300),rng.normal(59, 10, 300)
    d = Evaluation(a) - Evaluation(b)
    assert d.p == pytest.approx(ttest_rel(a, b).pvalue) and d.mean == pytest.approx(a.mean() - b.mean())
    assert d.ci95 == pytest.approx(1.96*np.sqrt(((a-b - d.mean)**2).sum()/299/300))

def test_difference_of_a_model_with_itself_is_nothing():
    d = Evaluation(np.arange(5.)) - Evaluation(np.arange(5.))
    assert (d.mean, d.p, d.clear) == (0, 1., 0)

def test_p_is_uniform_where_there_is_no_difference():
    rng = np.random.default_rng(0)
    p = np.array([Difference(rng.normal(0, 1, 50)).p for _ in range(2000)])
    assert abs((p < .05).mean() - .05) < .015 and abs(np.median(p) - .5) < .04

def test_other_episodes_cannot_be_compared():
    h,y = torch.randn(160, 4),torch.arange(8).repeat_interleave(20)
    a = evaluate(h, y, n_episodes=20)
    for other in (dict(seed=1), dict(k_shot=2), dict(n_way=4)):
        with pytest.raises(UserError, match='the same episodes'): a - evaluate(h, y, **dict(n_episodes=20) | other)
    with pytest.raises(UserError, match='the same episodes'): a - evaluate(h, y.flip(0), n_episodes=20)
    assert (a - evaluate(h, y, n_episodes=20)).mean == 0

def test_an_order_holds_only_if_every_seed_says_so():
    up,down,unclear = Difference(np.array([1., 2, 3])),Difference(np.array([-1., -2, -3])),Difference(np.array([5., -4.]))
    assert [d.clear for d in (up, down, unclear)] == [1, -1, 0]
    assert over_seeds([up, up])['holds'] == 1 and over_seeds([down])['holds'] == -1
    assert over_seeds([up, down])['holds'] == over_seeds([up, unclear])['holds'] == 0
    assert over_seeds([up, down]) == dict(mean=0., sd=pytest.approx(np.std([2, -2], ddof=1)), seeds=2, holds=0)

def test_compare_takes_each_with_those_before_it_and_sums_up_over_seeds():
    "Three models of known distances, two seeds, noise shared by all: by hand"
    rng = np.random.default_rng(0)
    noise = {seed:rng.normal(0, 10, 50) for seed in (0, 1)}
    scores = {k:{seed:Evaluation(60 + up[seed] + e + rng.normal(0, .1, 50)) for seed,e in noise.items()} for k,up in
              dict(a=(0, 0), b=(1, 3), c=(2, -2)).items()}
    t = compare(scores).set_index(['row','versus','seed'])
    assert (len(t) == 9 and t.loc['b','a','all'].difference == pytest.approx(2, abs=.1)
            and t.loc['b','a','all'].sd == pytest.approx(2**.5, abs=.1))
    assert t.loc['b','a',1].difference == pytest.approx(3, abs=.1) and t.loc['b','a',1].ci95 < .1 and t.loc['b','a',1].p < 1e-9
    assert t.clear['b','a','all'] == 1 and t.clear['c','a',0] == 1 and t.clear['c','a',1] == -1 and t.clear['c','a','all'] == 0
    two = compare(dict(x=scores['a'][0], y=scores['b'][0]))
    assert len(two) == 1 and two.difference[0] == pytest.approx(t.loc['b','a',0].difference)


# ---- networks ---------------------------------------------------------------------------------------------------------

def test_stage_one_is_trained_once_for_all_rows_and_experiments(small, tmp_path):
    rows = ROWS | {'self': GR | dict(phi='student')}
    table('a', rows, out=tmp_path, **small)
    first = weights(tmp_path)
    assert sorted(name.split('-')[0] for name in first) == ['cl','cl','el','gr','gr']
    times = {p:p.stat().st_mtime_ns for p in tmp_path.glob('*/net.safetensors')}
    table('b', rows, out=tmp_path, **small)
    assert {p:p.stat().st_mtime_ns for p in tmp_path.glob('*/net.safetensors')} == times

def test_a_row_comes_to_the_same_bits_alone_and_among_others(small, tmp_path):
    table('a', ROWS, out=tmp_path/'a', **small)
    table('b', {'GRDD':ROWS['GRDD']}, out=tmp_path/'b', **small)
    a,b = weights(tmp_path/'a'),weights(tmp_path/'b')
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
    assert 8 < sessions < 20 and weights(tmp_path/'a') == weights(tmp_path/'b')

def test_seeds_of_stage_two_alone_share_one_stage_one(small, tmp_path):
    made = table('a', ROWS, out=tmp_path, results=tmp_path/'results', seeds='0,1,2', stage_one_seed=1, **small)
    assert (sorted(n.rsplit('-', 1)[0] for n in weights(tmp_path))
            == ['cl-convnet4-s1', 'cl-convnet4_128-s0', *(f'{k}-convnet4-s{i}' for k in ('el','gr') for i in range(3))])
    records = [json.loads(p.read_text()) for p in (tmp_path/'results').glob('*/*.json')]
    assert len(made.scored) == len(records) == 7 and [r['seed'] for r in records if r['row'] == 'CL'] == [1] # once
    d = made.pairs[(made.pairs.row == 'GRDD') & (made.pairs.versus == 'CL')].set_index('seed').difference
    of = {r['seed']:r['versus']['CL']['1-shot']['difference'] for r in records if r['row'] == 'GRDD'}
    assert sorted(of) == [0, 1, 2] and of == {seed:pytest.approx(d[seed], abs=1e-3) for seed in of}
    assert d['all'] == pytest.approx(np.mean([d[i] for i in range(3)]))

def test_other_settings_and_other_seeds_are_other_networks(data, tmp_path):
    study = Study(data, tmp_path)
    a,b = (study.folder('cl', 'x', STAGE_ONE | c) for c in ({}, dict(lr=0.1)))
    assert a != b and a == study.folder('cl', 'x', dict(reversed(STAGE_ONE.items())))

def test_episodic_labels_do_not_depend_on_the_distillations_settings(small, tmp_path):
    table('a', {'x':EL, 'y':EL | dict(stage_two=dict(T=9., gamma=9., decouple=False)), 'z':EL | dict(stage_two=dict(scale=9.))},
          out=tmp_path, **small)
    assert len([n for n in weights(tmp_path) if n.startswith('el')]) == 2

def test_the_bank_changes_nothing(data):
    "The teacher's features handed over, or embedded by the callback: the same losses"
    from grdd_fastai.models.create import create_backbone
    s = READINGS['paper'] | dict(way=3, query=4, episodes=2, epochs=1)
    teacher,losses = create_backbone('convnet4_128', 0, 16, 1),[]
    for bank in (None, embed(teacher, plain_dl(data, 'train'))[0]):
        learn,fit = stage_two(data, s, create_backbone('convnet4', 0, 16), teacher, bank)
        with learn.no_bar(), learn.no_logging(): fit(learn)
        losses.append(learn.recorder.values[-1][0])
    assert losses[0] == losses[1]
    learn,fit = stage_two(data, s, create_backbone('convnet4', 0, 16), teacher, bank[:5])
    with pytest.raises(ValueError, match='a bank of 5 features'), learn.no_bar(): fit(learn)


# ---- tables and records -----------------------------------------------------------------------------------------------

def test_scores_are_those_of_the_saved_weights_on_episodes_that_chose_nothing(small, data, tmp_path):
    scored,pairs,_,study,_ = table('a', ROWS, out=tmp_path, shots='1,5', seeds='0,1', **small)
    assert list(scored.shot) == [1, 5]*6 and set(scored.split) == {'val'} and len(pairs) == 3*2*3
    made = study.global_net(arch='convnet4', epochs=1, schedule='one_cycle', lr=0.1, rotation=False, seed=1)
    want = evaluate(*embed(made.net, plain_dl(study.data, 'val')), 5, 5, 15, 40, seed=1)
    got = scored[(scored.row == 'CL') & (scored.seed == 1) & (scored.shot == 5)].iloc[0]
    assert got.accuracy == pytest.approx(want.accuracy, abs=1e-3)
    one = pairs[(pairs.row == 'GRDD') & (pairs.versus == 'CL') & (pairs.shot == 1)]
    seeds = one[one.seed != 'all'].difference.to_numpy(float)
    assert list(one.seed) == [0, 1, 'all'] and one.difference.iloc[2] == pytest.approx(seeds.mean(), abs=1e-3)
    csv = pd.read_csv(tmp_path/'a_val.csv')
    assert csv.accuracy.tolist() == scored.accuracy.tolist()

def test_records_hold_what_a_number_needs_and_novel_scorings_are_logged_once(small, tmp_path):
    for _ in range(2): table('a', ROWS, out=tmp_path, results=tmp_path/'results', score='novel', **small)
    log = [json.loads(line) for line in (tmp_path/'novel_scorings.jsonl').read_text().splitlines()]
    assert [o['what'].split('-')[0] for o in log] == ['cl','el','gr']
    r = json.loads(next((tmp_path/'results'/'a').glob('grdd-*-s0-novel.json')).read_text())
    assert {'command','seed','settings','data','networks','scored','scores','versus','paper'} <= set(r)
    assert (r['supervision'], r['phi'], r['psi'], r['split'], r['paper']) == ('CL+GR', 'convnet4_128', 'convnet4', 'novel', {'1-shot':69.3})
    assert set(r['versus']) == {'CL','CL+EL'} and r['scores']['1-shot']['n'] == 40 and r['settings']['teacher']['arch'] == 'convnet4_128'
    assert (set(r['networks']) == {'student','teacher','net'}
            and all(n['minutes'] >= 0 and n['commit'] and n['device'] for n in r['networks'].values()))

def test_a_log_that_came_later_has_the_scorings_that_were_made_before(small, tmp_path):
    table('a', {'CL':CL}, out=tmp_path, score='novel', **small)
    table('a', {'CL':CL}, out=tmp_path, score='novel', results=tmp_path/'results', **small)
    a,b = ((tmp_path/f/'novel_scorings.jsonl').read_text() for f in ('.','results'))
    assert a == b and a.count('\n') == 1

def test_a_row_brings_those_it_is_compared_with(small, tmp_path):
    scored,pairs,*_ = table('a', ROWS | {'more':EL}, 'CL+EL', out=tmp_path, **small)
    assert list(scored.row) == ['CL','CL+EL'] and list(pairs.versus) == ['CL']

def test_a_row_that_diverges_leaves_the_others_their_turn(small, tmp_path, capsys):
    rows = {'CL':CL, 'bad':EL | dict(stage_two=dict(lr=1e30)), 'CL+EL':EL}
    made = table('a', rows, out=tmp_path, **small | dict(episodes=5))
    assert list(made.scored.row) == ['CL','CL+EL'] and len(made.failed) == 1 and made.failed[0].startswith('bad, seed 0')
    assert json.loads(capsys.readouterr().out)['failed'] == made.failed

def test_equal_architectures_share_whatever_their_roles_are_called(small, tmp_path):
    _,_,nets,_,_ = table('a', {'GRDD':GR}, out=tmp_path, seeds='0,1', **small | dict(teacher='convnet4'))
    assert all(nets['GRDD', s]['teacher'].folder == nets['GRDD', s]['student'].folder for s in (0, 1))

def test_two_processes_share_what_one_trains(small, tmp_path):
    "Both are at work in one folder: the same result in both, every network trained once"
    import threading
    out = {}
    def work(name): out[name] = table(name, ROWS, out=tmp_path, **small | dict(episodes=5)).scored
    threads = [threading.Thread(target=work, args=(n,)) for n in 'ab']
    for t in threads: t.start()
    for t in threads: t.join()
    assert out['a'].equals(out['b']) and len(weights(tmp_path)) == 4

@pytest.mark.parametrize('wrong, says', [
    (dict(keep='CL,ELL'), "no row 'ELL': the rows are CL, CL"), (dict(score='test'), '--score is test'),
    (dict(seeds='0;1'), "--seeds is '0;1'"), (dict(reading='worst'), "unknown reading 'worst'"),
    (dict(schedule='cosine'), "--schedule is cosine"),
    (dict(student='convnet5'), "unknown backbone 'convnet5'"), (dict(shots='10'), 'too few for 10 support'),
    (dict(seeds='-1'), '--seed is -1'), (dict(epochs=0), '--epochs is 0'),
    (dict(meta_lr=-1.), '--meta-lr is -1')])
def test_wrong_settings_are_one_sentence(small, tmp_path, wrong, says):
    with pytest.raises(UserError, match=says): table('a', ROWS, out=tmp_path/'x', **small | wrong)
    assert not (tmp_path/'x').exists()

def test_a_reading_takes_only_what_is_given():
    assert (stage_two_settings('paper', lr=None) == READINGS['paper'] and stage_two_settings('paper', lr=.5)['lr'] == .5
            and READINGS['paper']['lr'] == 1e-3)


# ---- the recipes ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, rows, n', [('table2', None, 8), ('ablations', None, 6), ('sweep', 'CL,gamma=0,T=1,T=4', 5)])
def test_each_experiment_writes_its_table_and_its_figure(small, tmp_path, name, rows, n):
    recipe(name)(out=str(tmp_path), rows=rows, **small)
    assert len(pd.read_csv(tmp_path/f'{name}_val.csv')) == n and (tmp_path/f'{name}_val.png').stat().st_size > 5000

def test_figures_shows_the_same_images_in_each_panel(small, tmp_path):
    recipe('figures')(out=str(tmp_path), images=8, **small)
    tsne,relatedness = pd.read_csv(tmp_path/'figure3.csv'),pd.read_csv(tmp_path/'figure5.csv')
    rows = [of.row.tolist() for _,of in tsne.groupby('network')]
    assert len(rows) == 3 and rows[0] == rows[1] == rows[2] and len(set(rows[0])) == 40 and tsne.groupby('label').size().eq(24).all()
    by_support = relatedness.groupby(['softmax','T','support']).weight.sum()
    assert np.allclose(by_support['decoupled'], 1, atol=1e-5) and np.allclose(by_support['whole'].groupby('T').sum(), 1, atol=1e-5)
    assert all((tmp_path/f'figure{i}.png').stat().st_size > 5000 for i in (3, 5)) and not (tmp_path/'novel_scorings.jsonl').exists()
