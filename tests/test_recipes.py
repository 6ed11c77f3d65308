"""Every recipe on tiny data, the contract of its output, and one sentence for each thing a user can get wrong."""
import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import ROOT, write_csv_set
from PIL import Image
from safetensors.torch import load_file

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import evaluate

GRDD = ('cifarfs_5w1s','cifarfs_5w5s','mini_5w1s','mini_5w5s')
SMALL = dict(teacher='convnet4', student='convnet4', epochs=1, meta_epochs=1, episodes=4, test_episodes=50, query=5)

def recipe(name): return runpy.run_path(str(ROOT/'recipes'/f'{name}.py'))['main']

def shell(*args, **env):
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env},
                          timeout=550)


@pytest.mark.parametrize('name', GRDD)
def test_each_recipe_runs_and_fills_its_folder(csv_set, cache, tmp_path, name):
    r = recipe(name)(data=str(csv_set), cache=str(cache), out=str(tmp_path/'run'), **SMALL)
    assert r['shot'] == int(name[-2]) and r['way'] == 5 and r['dataset'] == csv_set.name and r['status'] == 'finished'
    assert json.loads((tmp_path/'run'/'result.json').read_text()) == r
    settings,read = json.loads((tmp_path/'run'/'settings.json').read_text()),json.loads((tmp_path/'run'/'data.json').read_text())
    assert (settings['settings']['epochs'] == 1 and settings['settings']['px'] == (84 if 'mini' in name else 32)
            and {'commit','versions','device'} <= set(settings))
    assert len(read['fingerprint']) == 64
    history = pd.read_csv(tmp_path/'run'/'history_student_grdd.csv')
    assert list(history.columns) == ['epoch','train_loss','L_kl','L_rt','accuracy'] and len(history) == 1
    scorings = [json.loads(line) for line in (tmp_path/'run'/'novel_scorings.jsonl').read_text().splitlines()]
    assert [s['what'] for s in scorings] == ['untrained','cl','grdd'] and scorings[2]['accuracy'] == pytest.approx(r['accuracy'], abs=1e-3)

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
    from grdd_fastai.data.cache import few_shot_data
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
    for k,v,says in (('epochs',0,'--epochs is 0'), ('lr',float('nan'),'--lr is nan: it must be positive'), ('lr',-1,'--lr is -1'),
                     ('T',0,'--t is 0'), ('gamma',-1,'--gamma is -1'), ('seed',-1,'--seed is -1'), ('seed',2**64,'--seed is'),
                     ('max_minutes',0,'--max-minutes is 0')):
        assert says in wrong(tmp_path, data=str(csv_set), **{k:v})
    assert 'inception_v3 does not take images of 32 px' in wrong(tmp_path, data=str(csv_set), teacher='inception_v3')
    assert not (tmp_path/'run').exists() # a run that never began leaves nothing

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

def test_an_undefined_interval_is_null(csv_set, cache, tmp_path):
    r = recipe('cifarfs_5w1s')(data=str(csv_set), cache=str(cache), out=str(tmp_path/'run'), **{**SMALL, 'test_episodes':1})
    assert r['ci95'] is None and 'NaN' not in (tmp_path/'run'/'result.json').read_text()

def test_mini_imagenet_has_to_be_brought():
    with pytest.raises(UserError, match='miniImageNet cannot be fetched'): recipe('mini_5w5s')(out='never')

def test_on_the_command_line_an_error_is_the_last_line_and_no_traceback(tmp_path):
    out = shell('recipes/cifarfs_5w1s.py', '--data', tmp_path/'no-such', '--out', tmp_path/'run')
    assert out.returncode == 1 and out.stdout == '' and 'Traceback' not in out.stderr
    assert out.stderr.strip().splitlines()[-1].startswith('no such file or folder') and not (tmp_path/'run'/'result.json').exists()

def test_prepare_data_recipe(csv_set, tmp_path, capsys):
    recipe('prepare_data')(data=str(csv_set), out=str(tmp_path/'out'))
    assert capsys.readouterr().out.strip() == str(tmp_path/'out') and (tmp_path/'out'/'images').is_dir()
