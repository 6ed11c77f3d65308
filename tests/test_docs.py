"""Documentation is executed: README's commands and code, the file map, the notebook, the wheel."""
import os
import re
import runpy
import subprocess
import sys
import zipfile

import nbformat
import pytest
from fastcore.script import anno_parser
from helpers import ROOT, write_images
from naive import BACKBONES
from PIL import Image

README = (ROOT/'README.md').read_text()

def blocks(lang, of=''): return [b for b in re.findall(rf'```{lang}\n(.*?)```', README, re.S) if of in b]


def test_ci_runs_the_readmes_test_command_in_a_fresh_environment():
    ci = (ROOT/'.ci'/'run').read_text()
    assert blocks('bash')[1].strip() in ci.splitlines() and 'python3 -m venv' in ci

def test_readmes_commands_name_recipes_and_flags_that_exist():
    commands = [c for b in blocks('bash') for c in b.replace('\\\n', '').splitlines() if 'recipes/' in c]
    for command in commands:
        path = re.search(r'recipes/\w+\.py', command)[0]
        text = anno_parser(runpy.run_path(str(ROOT/path))['main'].__wrapped__).format_help()
        for flag in re.findall(r'--[\w-]+', command.split('#')[0].split(path)[1]):
            assert f'{flag} ' in text or f'{flag}]' in text, (command, flag)

def test_readmes_code_runs(data, csv_set, cache, monkeypatch):
    "On the tiny set, with one epoch and fewer episodes"
    import grdd_fastai.all as everything
    monkeypatch.setenv('XDG_CACHE_HOME', str(cache))
    code = (blocks('python', 'global_learner')[0].replace("'my-data/'", repr(str(csv_set)) + ', px=16')
            .replace('fit_one_cycle(10', 'fit_one_cycle(1').replace('fit_one_cycle(3', 'fit_one_cycle(1'))
    code = (code.replace('learn.lr_find()', 'learn.lr_find(num_it=30, show_plot=False)').replace('n_way=20', 'n_way=5')
            .replace('n_query=6', 'n_query=6, n_episodes=2'))
    scope = {}
    exec(code, scope)
    assert scope['meta'].model.num_features == 64 and hasattr(everything, 'evaluate')

def test_readmes_weights_load():
    scope = dict(image=Image.new('RGB', (50, 40), 'red'))
    exec(blocks('python', 'create_transform')[0], scope)
    assert scope['h'].shape == (1, 64)

def test_readmes_few_photos_are_classified(tmp_path):
    for c,hue in (('cat', 0.), ('dog', .5)): write_images(tmp_path/'few'/c, ['1.jpg', '2.jpg'], 40, 0, hue)
    for name,c in (('new1', 'dog'), ('new2', 'cat')): Image.open(tmp_path/'few'/c/'1.jpg').save(tmp_path/f'{name}.jpg')
    code = (blocks('python', 'FewShotClassifier')[0].replace("'few/'", repr(str(tmp_path/'few'))).replace("'new", f"'{tmp_path}/new")
            .replace('few.predict', 'said = few.predict'))
    scope = {}
    exec(code, scope)
    assert scope['said'] == ['dog','cat']

def test_the_file_map_names_every_file():
    table = README.split('## Files')[1]
    for f in [*(ROOT/'grdd_fastai').rglob('*.py'), *(ROOT/'recipes').glob('*.py'), *(ROOT/'notebooks').glob('*.ipynb')]:
        if f.name != '__init__.py': assert f'`{f.relative_to(ROOT)}`' in table, f
    for f in re.findall(r'`([\w/]+\.(?:py|md|ipynb))`', table): assert (ROOT/f).exists(), f

def test_readme_lists_every_backbone():
    for name in BACKBONES: assert f'`{name}`' in README

def test_nothing_imports_a_recipe():
    for f in (ROOT/'grdd_fastai').rglob('*.py'): assert 'import recipes' not in f.read_text() and 'from recipes' not in f.read_text()

def test_dependencies_are_listed_once():
    env = (ROOT/'environment.yml').read_text()
    assert '-e .[dev]' in env and 'torch' not in env

@pytest.mark.slow
def test_the_notebook_runs_top_to_bottom_and_is_stored_without_outputs(tmp_path, monkeypatch):
    from nbclient import NotebookClient
    nb = nbformat.read(ROOT/'notebooks'/'grdd_in_ten_cells.ipynb', as_version=4)
    nbformat.validate(nb)
    code = [c for c in nb.cells if c.cell_type == 'code']
    assert len(code) == 10 and all(c.outputs == [] and c.execution_count is None for c in code)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    NotebookClient(nb, timeout=400, kernel_name='python3', resources={'metadata':{'path':str(tmp_path)}}).execute()
    pictures = [o for c in code for o in c.outputs if 'image/png' in o.get('data', {})]
    assert len(pictures) >= 3
    grdd,cl = re.findall(r'(\d+\.\d+) ± ', code[-3].outputs[-1]['data']['text/plain'])
    untrained = re.search(r'(\d+\.\d+) ±', code[-1].outputs[-1]['data']['text/plain'])[1]
    assert min(float(grdd), float(cl)) > float(untrained) + 10

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp('wheel')
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', out, ROOT], check=True)
    return next(out.glob('*.whl'))

def test_a_wheel_works_outside_the_clone(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        z.extractall(tmp_path/'site')
    assert {'grdd_fastai/class_lists/cifar_fs.csv', 'grdd_fastai/class_lists/mini_imagenet.csv'} <= set(names)
    assert not [n for n in names if n.startswith(('tests','recipes','data'))]
    code = f"import sys; sys.path.insert(0, {str(tmp_path/'site')!r}); import grdd_fastai, timm; " \
           "from grdd_fastai.data.layouts import class_list; " \
           "assert 'site' in grdd_fastai.__file__ and len(class_list('mini_imagenet')) == 100 " \
           "and timm.create_model('convnet4.grdd_cifarfs', pretrained=True).num_features == 64"
    subprocess.run([sys.executable, '-c', code], check=True, cwd=tmp_path, env=os.environ | dict(HF_HUB_OFFLINE='1'))
