"""GRDD whole, by its four recipes on tiny data: the contract of its output, and a sentence for each thing a user can get wrong."""
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from helpers import NO_FOLDER, ROOT, SMALL, launch, leavings, recipe, says, settings, shell, write_csv_set
from PIL import Image
from safetensors.torch import load_file

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.grdd import grdd
from grdd_fastai.models.create import create_backbone
from grdd_fastai.models.pretrained import load_network

GRDD = ('cifarfs_5w1s','cifarfs_5w5s','mini_5w1s','mini_5w5s')


@pytest.mark.parametrize('name', GRDD)
def test_each_recipe_runs_and_fills_its_folder(csv_set, cache, tmp_path, name):
    r = recipe(name)(data=str(csv_set), cache=str(cache), out=str(tmp_path/'run'), **SMALL)
    assert r['shot'] == int(name[-2]) and r['way'] == 5 and r['dataset'] == csv_set.name and r['status'] == 'finished'
    assert json.loads((tmp_path/'run'/'result.json').read_text()) == r
    settings,read = json.loads((tmp_path/'run'/'settings.json').read_text()),json.loads((tmp_path/'run'/'data.json').read_text())
    assert (settings['settings']['student']['epochs'] == 1 and settings['settings']['px'] == (84 if 'mini' in name else 32)
            and {'commit','versions','device'} <= set(settings))
    assert len(read['fingerprint']) == 64
    history = pd.read_csv(tmp_path/'run'/'history_student_grdd.csv')
    assert list(history.columns) == ['epoch','train_loss','valid_loss','L_kl','L_rt','accuracy'] and len(history) == 1
    scorings = [json.loads(line) for line in (tmp_path/'run'/'novel_scorings.jsonl').read_text().splitlines()]
    assert [s['what'] for s in scorings] == ['untrained','cl','grdd'] and scorings[2]['accuracy'] == pytest.approx(r['accuracy'], abs=1e-3)

def test_the_general_recipe_is_the_program_with_its_numbers(csv_set, cache, tmp_path):
    numbers = dict(way=4, shot=2, px=16) | SMALL
    r = recipe('train')(data=str(csv_set), cache=str(cache), out=str(tmp_path/'a'), **numbers)
    same = grdd(data=str(csv_set), cache=str(cache), out=str(tmp_path/'b'), **numbers)
    assert (r['way'], r['shot'], r['status']) == (4, 2, 'finished')
    assert {k:v for k,v in r.items() if k != 'seconds'} == {k:v for k,v in same.items() if k != 'seconds'}

def test_a_recipe_scores_with_several_classifiers(csv_set, cache, tmp_path):
    r = recipe('cifarfs_5w1s')(data=str(csv_set), cache=str(cache), out=str(tmp_path/'run'), classifiers='tim_adm,cosine,simpleshot_l2n',
                               **SMALL)
    plain = recipe('cifarfs_5w1s')(data=str(csv_set), cache=str(cache), out=str(tmp_path/'plain'), **SMALL)
    assert r['classifier'] == 'tim_adm' and list(r['others']) == ['cosine','simpleshot_l2n'] and plain['others'] == {}
    assert (r['others']['cosine']['accuracy'], r['others']['cosine']['accuracy_cl']) == (plain['accuracy'], plain['accuracy_cl'])
    with pytest.raises(UserError, match="unknown classifier 'x'"):
        recipe('cifarfs_5w1s')(data=str(csv_set), out=str(tmp_path/'x'), classifiers='x', **SMALL)

def test_weights_saved_are_those_scored(data, cache, csv_set, tmp_path):
    r = recipe('cifarfs_5w1s')(data=str(csv_set), cache=str(cache), out=str(tmp_path/'run'), **{**SMALL, 'test_episodes':200})
    data = few_shot_data(csv_set, px=32, cache=cache)
    for file,key in (('student_grdd','accuracy'), ('student_cl','accuracy_cl')):
        state,card = load_file(tmp_path/'run'/f'{file}.safetensors'),json.loads((tmp_path/'run'/f'{file}.json').read_text())
        net = timm.create_model(card['arch'], num_classes=6 if 'head.weight' in state else 0)
        net.load_state_dict(state)
        assert evaluate(*embed(net, plain_dl(data)), 5, 1, 5, 200).accuracy == pytest.approx(r[key], abs=1e-3)

def test_two_architectures_train_apart_and_one_shares(csv_set, cache, tmp_path):
    main = recipe('cifarfs_5w1s')
    for name,kwargs,teacher in (('shared', {}, False), ('apart', dict(independent_teacher=True), True),
                                ('other', dict(teacher='convnet4_128'), True)):
        main(data=str(csv_set), cache=str(cache), out=str(tmp_path/name), **{**SMALL, **kwargs})
        assert (tmp_path/name/'teacher.safetensors').exists() == teacher
    a,b = (load_file(tmp_path/'apart'/f'{n}.safetensors') for n in ('teacher','student_cl'))
    assert not torch.equal(a['stages.0.0.weight'], b['stages.0.0.weight'])

def test_same_command_same_result(csv_set, cache, tmp_path):
    a,b = (recipe('cifarfs_5w1s')(data=str(csv_set), cache=str(cache), out=str(tmp_path/n), **SMALL) for n in 'ab')
    assert {k:v for k,v in a.items() if k != 'seconds'} == {k:v for k,v in b.items() if k != 'seconds'}
    assert (tmp_path/'a'/'student_grdd.safetensors').read_bytes() == (tmp_path/'b'/'student_grdd.safetensors').read_bytes()

def test_explicit_flags_win_over_the_demos(csv_set, cache, tmp_path):
    r = recipe('mini_5w1s')(demo=True, data=str(csv_set), cache=str(cache), out=str(tmp_path/'r'), **SMALL)
    assert r['demo'] and r['epochs'] == 1 and r['test_episodes'] == 50 and r['dataset'] == csv_set.name

def test_a_demo_has_a_folder_of_its_own(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr('grdd_fastai.grdd.Run', lambda out, *_, **__: seen.append(out) or (_ for _ in ()).throw(UserError('enough')))
    for demo in (False, True):
        for name in ('cifarfs_5w1s', 'mini_5w5s'):
            with pytest.raises(UserError, match='enough'): recipe(name)(data='x', demo=demo)
    assert seen == ['runs/cifarfs_5w1s', 'runs/mini_5w5s', 'runs/cifarfs_5w1s-demo', 'runs/mini_5w5s-demo'] and not list(tmp_path.iterdir())

def test_a_tag_starts_from_its_weights_and_the_result_says_so(csv_set, cache, tmp_path):
    common = dict(data=str(csv_set), cache=str(cache), **SMALL | dict(epochs=1))
    r = recipe('cifarfs_5w1s')(out=str(tmp_path/'a'), **common | dict(student='convnet4.grdd_cifarfs'))
    assert (r['initial_weights'] == dict(teacher='random', student='convnet4.grdd_cifarfs') and 'accuracy_pretrained' in r
            and 'accuracy_untrained' not in r)
    shipped,fresh = (create_backbone(n, 0, 32).state_dict() for n in ('convnet4.grdd_cifarfs', 'convnet4'))
    assert (torch.equal(shipped['stages.1.0.weight'], create_backbone('convnet4', 7, 32, pretrained=True).state_dict()['stages.1.0.weight'])
            and not torch.equal(shipped['stages.1.0.weight'], fresh['stages.1.0.weight']))
    trained = load_network(tmp_path/'a'/'student_cl').state_dict()['stages.0.0.weight']
    near = [(trained - s['stages.0.0.weight']).abs().mean() for s in (shipped, fresh)]
    assert near[0] < near[1]/3
    r = recipe('cifarfs_5w1s')(out=str(tmp_path/'b'), **common)
    assert r['initial_weights'] == dict(teacher='random', student='random') and 'accuracy_untrained' in r

def test_an_undefined_interval_is_null(csv_set, cache, tmp_path):
    r = recipe('cifarfs_5w1s')(data=str(csv_set), cache=str(cache), out=str(tmp_path/'run'), **{**SMALL, 'test_episodes':1})
    assert r['ci95'] is None and 'NaN' not in (tmp_path/'run'/'result.json').read_text()

@pytest.mark.slow
def test_it_learns_data_it_never_saw(tmp_path, cache):
    "Four epochs on a set of other names, counts, sizes and formats: at least five points above the untrained network"
    rng = np.random.default_rng(0)
    for c in range(40): # textures of a frequency, a kind and a colour, at any angle
        folder,freq,base = tmp_path/'things'/f'Texture no. {c}',rng.uniform(1, 8),rng.uniform(60, 200, 3)
        folder.mkdir(parents=True)
        for j in range(28 + c%5):
            w,h = rng.integers(24, 64, 2)
            y,x = np.mgrid[:h, :w]/32
            angle,phase = rng.uniform(0, 2*np.pi, 2)
            u,v = x*np.cos(angle) + y*np.sin(angle),y*np.cos(angle) - x*np.sin(angle)
            wave = np.sin(2*np.pi*freq*u + phase)
            wave = (wave, wave*np.sin(2*np.pi*freq*v), np.sign(wave))[c%3]
            im = base + rng.normal(0, 40, 3) + 50*wave[..., None] + rng.normal(0, 20, (h, w, 3))
            Image.fromarray(im.clip(0, 255).astype(np.uint8)).save(folder/f'{j}.{("jpg","png","bmp","webp")[j%4]}')
    r = recipe('cifarfs_5w1s')(data=str(tmp_path/'things'), cache=str(cache), out=str(tmp_path/'run'),
                               **{**SMALL, 'epochs':4, 'meta_epochs':2, 'test_episodes':1000, 'episodes':40, 'query':15})
    assert r['accuracy'] > r['accuracy_untrained'] + 5


# ---- on the command line and in two processes -------------------------------------------------------------------------

@pytest.mark.slow
def test_the_real_zip_by_the_command_of_the_readme(real_zip, cache, tmp_path):
    "Progress on stderr, the result alone on stdout; one step of each stage is enough here"
    out = shell('recipes/cifarfs_5w1s.py', '--data', real_zip, '--cache', cache, '--out', tmp_path/'run',
                '--teacher', 'convnet4', '--student', 'convnet4',
                '--epochs', 1, '--meta-epochs', 1, '--episodes', 2, '--test-episodes', 100, '--bs', 1024, '--no-rotation')
    assert out.returncode == 0, out.stderr[-2000:]
    assert len(out.stdout.strip().splitlines()) == 1
    r = json.loads(out.stdout)
    assert {'dataset','way','shot','teacher','student','test_episodes','accuracy','ci95','accuracy_cl','ci95_cl','accuracy_untrained',
            'seed','seconds','status'} <= set(r)
    assert r['dataset'] == 'cifar_fs' and r['test_episodes'] == 100 and 20 < r['accuracy_untrained'] < 60

@pytest.mark.slow
def test_the_demo_on_the_command_line(tmp_path):
    "The README's first command with its folders elsewhere: it learns, and says loudly what it is"
    out = shell('recipes/cifarfs_5w1s.py', '--demo', '--out', tmp_path/'run', '--cache', tmp_path/'cache')
    assert out.returncode == 0, out.stderr[-2000:]
    r = json.loads(out.stdout.strip().splitlines()[-1])
    assert 'DEMO' in out.stderr and r['dataset'] == 'demo' and r['accuracy'] >= r['accuracy_untrained'] + 10

def test_on_the_command_line_an_error_is_the_last_line_and_no_traceback(tmp_path):
    out = shell('recipes/cifarfs_5w1s.py', '--data', tmp_path/'no-such', '--out', tmp_path/'run')
    assert out.returncode == 1 and out.stdout == '' and 'Traceback' not in out.stderr
    assert out.stderr.strip().splitlines()[-1].startswith('no such file or folder') and not (tmp_path/'run'/'result.json').exists()

def words(folder, cache, out, **kwargs):
    "The words of a recipe's command"
    s = dict(data=folder, cache=cache, out=out, teacher='convnet4', student='convnet4', epochs=3, meta_epochs=2, episodes=40, query=5,
             test_episodes=600, **kwargs)
    return [ROOT/'recipes'/'cifarfs_5w1s.py',
            *(str(o) for k,v in s.items() for o in ([f'--{k.replace("_", "-")}'] if v is True else [f'--{k.replace("_", "-")}', v]))]

def result(done):
    assert done.returncode == 0, done.stderr[-3000:]
    line, = done.stdout.strip().splitlines()[-1:]
    return json.loads(line)

@pytest.mark.slow
def test_a_recipe_in_two_processes_stops_resumes_and_writes_once(faint, cache, tmp_path):
    "Stopped at once and resumed, with the weights of a run undisturbed; rank 0's folder is the only one left"
    temporary = tmp_path/'tmp'
    temporary.mkdir()
    os.environ['TMPDIR'],was = str(temporary),os.environ.get('TMPDIR')
    try:
        straight = result(launch(*words(faint, cache, tmp_path/'a')))
        first = result(launch(*words(faint, cache, tmp_path/'b', max_minutes=.0001)))
        assert first['status'] == 'stopped'
        second = result(launch(*words(faint, cache, tmp_path/'b', resume=True)))
    finally:
        if was is None: del os.environ['TMPDIR']
        else: os.environ['TMPDIR'] = was
    assert second['accuracy'] == straight['accuracy'] and not list(temporary.glob('grdd_fastai_*'))
    for name in ('student_cl.safetensors', 'student_grdd.safetensors'):
        assert (tmp_path/'a'/name).read_bytes() == (tmp_path/'b'/name).read_bytes()
    assert {f.name for f in (tmp_path/'a').iterdir()} == {f.name for f in (tmp_path/'b').iterdir()}
    assert len((tmp_path/'a'/'novel_scorings.jsonl').read_text().splitlines()) == 3


def test_a_run_with_known_views_stops_after_each_and_needs_them_no_more_when_it_is_finished(csv_set, tmp_path, monkeypatch):
    "A time budget that one step or one view uses up; then the same weights as without a stop"
    how = dict(settings(csv_set, tmp_path/'cache'), teacher_view='views', views=2, pairs='all')
    straight = recipe('cifarfs_5w1s')(out=str(tmp_path/'a'), **how)
    views = tmp_path/'cache'/'features'
    assert len(list(views.glob('*.npy'))) == 2
    shutil.rmtree(views)
    numbers = []
    for _ in range(60):
        found = recipe('cifarfs_5w1s')(out=str(tmp_path/'b'), resume=True, max_minutes=1e-9, **how)
        numbers.append(len(list(views.glob('*.npy'))) if views.exists() else 0)
        if found['status'] == 'finished': break
    assert [numbers.count(n) > 0 for n in range(3)] == [True]*3 and numbers.count(1) == 1 and numbers == sorted(numbers)
    assert found['accuracy'] == straight['accuracy'] and leavings(tmp_path/'a') == leavings(tmp_path/'b')
    shutil.rmtree(views)
    assert recipe('cifarfs_5w1s')(out=str(tmp_path/'b'), resume=True, **how) == found and not views.exists()


# ---- what a user can get wrong ----------------------------------------------------------------------------------------

def wrong(tmp_path, **settings):
    with pytest.raises(UserError) as e:
        recipe('cifarfs_5w1s')(**{**SMALL, 'out':str(tmp_path/'run'), 'cache':str(tmp_path/'cache'), **settings})
    assert '\n' not in str(e.value)
    return str(e.value)

def test_wrong_settings_are_one_sentence(csv_set, tmp_path):
    (tmp_path/'file').write_text('')
    assert 'no such file' in wrong(tmp_path, data=str(tmp_path/'x'))
    assert "unknown backbone 'resnet13'" in wrong(tmp_path, data=str(csv_set), teacher='resnet13')
    assert ('file/run cannot be written (Not a directory): give --out another'
            in wrong(tmp_path, data=str(csv_set), out=str(tmp_path/'file'/'run')))
    assert '20 images, too few for 1 support + 20 query' in wrong(tmp_path, data=str(csv_set), query=20)
    assert 'val split has 3 classes, too few for 5-way' in wrong(tmp_path, data=str(write_csv_set(tmp_path/'few', (6, 3, 6), 8)))
    for k,v,sentence in (('epochs',0,'--epochs is 0'), ('lr',float('nan'),'--lr is nan: it must be a finite number, positive'),
                         ('lr',-1,'--lr is -1'),
                         ('T',0,'--t is 0'), ('gamma',-1,'--gamma is -1'), ('seed',-1,'--seed is -1'), ('seed',2**64,'--seed is'),
                         ('max_minutes',0,'--max-minutes is 0')):
        assert sentence in wrong(tmp_path, data=str(csv_set), **{k:v})
    assert 'inception_v3 does not take images of 32 px' in wrong(tmp_path, data=str(csv_set), teacher='inception_v3')
    assert not (tmp_path/'run').exists() # a run that never began leaves nothing

BAD_FLAGS = [dict(teacher='x'), dict(epochs=0), dict(schedule='x'), dict(lr=-1.), dict(bs=0), dict(head='x'), dict(smoothing=1.),
             dict(augment='x'), dict(opt='x'), dict(meta_opt='x'), dict(preset='x'), dict(meta_epochs=0),
             dict(meta_schedule='x'), dict(meta_lr=0.), dict(meta_way=1), dict(meta_query=0), dict(episodes=0), dict(episodes_per_step=0),
             dict(T=-1.), dict(gamma=-1.), dict(scale=0.), dict(teacher_view='x'), dict(query=0), dict(query=10**6),
             dict(test_episodes=0), dict(classifiers='x'), dict(seed=-1), dict(max_minutes=-1.), dict(data='/no/where'),
             dict(cache=NO_FOLDER), dict(student='convnet4.untrained'), dict(student='resnet18', pretrained='x', teacher='nothing.x')]

@pytest.mark.parametrize('bad', BAD_FLAGS, ids=[next(iter(b)) + str(i) for i,b in enumerate(BAD_FLAGS)])
def test_bad_flags_leave_nothing_behind(csv_set, cache, tmp_path, bad):
    says(lambda: recipe('cifarfs_5w1s')(**dict(out=str(tmp_path/'runs'/'x'), **settings(csv_set, cache)) | bad))
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('bad', [dict(test_episodes=10**13), dict(episodes=10**8), dict(epochs=10**9), dict(epochs=1.5), dict(epochs='3'),
                                 dict(lr='x'), dict(query=2.5)])
def test_numbers_that_no_run_can_have(csv_set, cache, tmp_path, bad):
    says(lambda: recipe('cifarfs_5w1s')(**dict(out=str(tmp_path/'x'), **settings(csv_set, cache)) | bad),
         f'--{next(iter(bad)).replace("_", "-")} is')
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('name, word', [('convnet4.untrained', 'has no pretrained weights'), ('convnet4.nothing', 'convnet4.grdd_cifarfs'),
                                        ('resnet12.x', 'give resnet12 for random ones')])
def test_a_tag_without_weights_is_refused(csv_set, cache, tmp_path, name, word):
    says(lambda: recipe('cifarfs_5w1s')(out=str(tmp_path/'run'), **settings(csv_set, cache, student=name)), word)
    assert np.array_equal(os.listdir(tmp_path), [])

def test_a_folder_of_the_users_own_is_left_alone(csv_set, cache, tmp_path):
    out,main = tmp_path/'mine',recipe('cifarfs_5w1s')
    out.mkdir()
    for name in ('package.json','my.safetensors','history_of_rome.csv'): (out/name).write_text('precious')
    main(data=str(csv_set), cache=str(cache), out=str(out), **SMALL)
    assert all((out/n).read_text() == 'precious' for n in ('package.json','my.safetensors','history_of_rome.csv'))
    before = (out/'result.json').read_bytes(),(out/'student_grdd.safetensors').read_bytes()
    with pytest.raises(UserError, match='no such file'): main(data='/no/where', cache=str(cache), out=str(out), overwrite=True, **SMALL)
    assert before == ((out/'result.json').read_bytes(), (out/'student_grdd.safetensors').read_bytes())
    (out/'settings.json').write_text('{}')
    (out/'settings.json').write_text('{"editor.fontSize": 12}')
    with pytest.raises(UserError, match="not a run's"): main(data=str(csv_set), cache=str(cache), out=str(out), **SMALL)

def test_mini_imagenet_has_to_be_brought():
    with pytest.raises(UserError, match='miniImageNet cannot be fetched'): recipe('mini_5w5s')(out='never')
