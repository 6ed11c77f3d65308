"""Experiments as rows of settings: scored on the same episodes, recorded, and a sentence for what goes wrong."""
import json

import pandas as pd
import pytest
from helpers import NO_FOLDER, ROWS, recipe, says

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.experiments.table import CL, EL, GR, table
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.stage_one import StageOne


def test_scores_are_those_of_the_saved_weights_on_episodes_that_chose_nothing(small, data, tmp_path):
    scored,pairs,_,store,_ = table('a', ROWS, out=tmp_path, shots='1,5', seeds='0,1', **small)
    assert list(scored.shot) == [1, 5]*6 and set(scored.split) == {'val'} and len(pairs) == 3*2*3
    made = store.stage_one_net(StageOne(arch='convnet4', epochs=1, schedule='one_cycle', lr=0.1, rotation=False, bs=64, seed=1))
    want = evaluate(*embed(made.net, plain_dl(store.data, 'val')), 5, 5, 15, 40, seed=1)
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

def test_a_row_from_random_weights_needs_no_stage_one_of_its_student(small, tmp_path):
    "Its record, its report and its model card say so"
    rows = dict(a=GR | dict(stage_two=dict(init='random')), b=EL | dict(stage_two=dict(init='random')), c=EL)
    made = table('a', rows, out=tmp_path/'out', results=tmp_path/'results', **small)
    assert list(made.scored.supervision) == ['GR', 'EL', 'CL+EL']
    trained = sorted(f.name.split('-')[0] for f in (tmp_path/'out').iterdir() if f.is_dir())
    assert trained == ['cl', 'cl', 'el', 'el', 'gr'] # stage one is c's student and a's teacher
    r = json.loads(next((tmp_path/'results'/'a').glob('a-*.json')).read_text())
    assert r['settings']['student'] == dict(arch='convnet4') and set(r['networks']) == {'teacher', 'net'}
    recipe('publish')(str(made.nets['a', 0]['net'].folder), data=small['data'], cache=small['cache'], out=str(tmp_path/'convnet4.mine'),
                      test_episodes=40)
    card = (tmp_path/'convnet4.mine'/'README.md').read_text()
    assert 'trained by GR on' in card and '- start: arch convnet4\n' in card and 'init random' in card

def test_a_row_may_be_the_teacher_of_another(small, tmp_path):
    "Its network of seed 0 teaches all seeds; report and model card tell both stages of the teacher"
    distilled = GR | dict(psi='teacher', stage_two=dict(lr=1e-3))
    rows = dict(a=distilled, b=GR | dict(phi=distilled, stage_two=dict(init='random')))
    made = table('a', rows, out=tmp_path/'out', results=tmp_path/'results'/'results', seeds='0,1', **small)
    assert {made.nets['b', seed]['teacher'].folder for seed in (0, 1)} == {made.nets['a', 0]['net'].folder}
    r = json.loads(next((tmp_path/'results'/'results'/'a').glob('b-*-s1-*.json')).read_text())
    assert r['settings']['teacher'] == made.nets['a', 0]['net'].settings and r['networks']['teacher']['arch'] == 'convnet4_128'
    recipe('publish')(str(made.nets['b', 0]['net'].folder), data=small['data'], cache=small['cache'], out=str(tmp_path/'convnet4.mine'),
                      test_episodes=40)
    card = (tmp_path/'convnet4.mine'/'README.md').read_text()
    stages = [line.split(':')[0] for line in card.splitlines() if line.startswith('- ')]
    assert stages == ['- start', "- teacher's start", "- teacher's teacher", "- teacher's stage two", '- stage two', '- command', '- data']

def test_a_log_that_came_later_has_the_scorings_that_were_made_before(small, tmp_path):
    table('a', {'CL':CL}, out=tmp_path, score='novel', **small)
    table('a', {'CL':CL}, out=tmp_path, score='novel', results=tmp_path/'results', **small)
    a,b = ((tmp_path/f/'novel_scorings.jsonl').read_text() for f in ('.','results'))
    assert a == b and a.count('\n') == 1

def test_a_row_brings_those_it_is_compared_with(small, tmp_path):
    scored,pairs,*_ = table('a', ROWS | {'more':EL}, 'CL+EL', out=tmp_path, **small)
    assert list(scored.row) == ['CL','CL+EL'] and list(pairs.versus) == ['CL']


# ---- what goes wrong --------------------------------------------------------------------------------------------------

def test_a_row_that_diverges_leaves_the_others_their_turn(small, tmp_path, capsys):
    rows = {'CL':CL, 'bad':EL | dict(stage_two=dict(lr=1e30)), 'CL+EL':EL}
    made = table('a', rows, out=tmp_path, **small | dict(episodes=5))
    assert list(made.scored.row) == ['CL','CL+EL'] and len(made.failed) == 1 and made.failed[0].startswith('bad, seed 0')
    assert json.loads(capsys.readouterr().out)['failed'] == made.failed

@pytest.mark.parametrize('wrong, says', [
    (dict(rows='CL,ELL'), "no row 'ELL': the rows are CL, CL"), (dict(score='test'), "--score is 'test'"),
    (dict(seeds='0;1'), "--seeds is '0;1'"), (dict(preset='worst'), "unknown preset 'worst'"),
    (dict(schedule='cosine'), "--schedule is 'cosine'"),
    (dict(student='convnet5'), "unknown backbone 'convnet5'"), (dict(shots='10'), 'too few for 10 support'),
    (dict(seeds='-1'), '--seed is -1'), (dict(epochs=0), '--epochs is 0'),
    (dict(meta_lr=-1.), '--meta-lr is -1')])
def test_wrong_settings_are_one_sentence(small, tmp_path, wrong, says):
    with pytest.raises(UserError, match=says): table('a', ROWS, out=tmp_path/'x', **small | wrong)
    assert not (tmp_path/'x').exists()

TINY = dict(student='convnet4', teacher='convnet4_128', epochs=1, teacher_epochs=1, episodes=3, test_episodes=20, meta_epochs=1)

@pytest.mark.parametrize('where', ['out', 'results'])
def test_a_folder_that_takes_no_files_is_said_before_the_first_training(csv_set, cache, tmp_path, monkeypatch, where):
    monkeypatch.setattr('grdd_fastai.experiments.table.train', lambda *_: pytest.fail('it trains'))
    given = dict(out=str(tmp_path/'out'), results=str(tmp_path/'results')) | {where:NO_FOLDER}
    says(lambda: table('a', {'CL':CL, 'CL+EL':EL}, data=str(csv_set), cache=str(cache), **given, **TINY), f'--{where}', NO_FOLDER)
    assert not list(tmp_path.iterdir())

def test_rows_that_fail_are_no_success(csv_set, cache, tmp_path, monkeypatch, capsys):
    "Every write of a run fails, as on a full disk: the exit code, the status and a sentence say so"
    def full(*_, **__): raise UserError('No space left on device')
    monkeypatch.setattr('grdd_fastai.runs.run.save_weights', full)
    says(lambda: recipe('table2')(rows='CL,CL+EL', data=str(csv_set), cache=str(cache), out=str(tmp_path/'out'), **TINY),
         '2 of the rows failed, CL, seed 0', 'No space left')
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert said['status'] == 'failed' and len(said['failed']) == 2
