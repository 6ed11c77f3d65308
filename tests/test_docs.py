"""Documentation is executed: README's and the pages' commands and code, the site, the notebooks, the wheel."""
import os
import re
import runpy
import shlex
import subprocess
import sys
import zipfile
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType

import nbformat
import pandas as pd
import pytest
from fastcore.script import anno_parser
from helpers import ROOT, write_csv_set, write_images
from naive import BACKBONES
from PIL import Image

from grdd_fastai.data.archives import Folder
from grdd_fastai.data.episodes import EpisodicDL
from grdd_fastai.fewshot.classifiers import CLASSIFIERS
from grdd_fastai.training.learner import FewShotLearner

README,CONTRIBUTING = ROOT/'README.md',ROOT/'CONTRIBUTING.md'
PAGES = [README, *sorted((ROOT/'docs').rglob('*.md'))]
AFTER = {'backbones.md': 'recipes.md'} # a page -> the page whose run it loads
OFFLINE = 'needs the network' # a comment in a block that is not run
COMMANDS = ('pip', 'python -m pytest', 'accelerate launch', 'torchrun', 'mkdocs', 'git', 'pre-commit', 'ruff')

def name(page): return page.relative_to(ROOT).as_posix()

def blocks(page, lang):
    "The fenced blocks of a page in a language"
    return re.findall(rf'^```{lang}\n(.*?)^```', page.read_text(), re.S | re.M)

def commands(block):
    "The commands of a bash block, without comments"
    lines = (line.split(' #')[0] for line in block.replace('\\\n', ' ').splitlines())
    return [c.strip() for line in lines if not line.startswith('#') for c in line.split('&&') if c.strip()]


# ---- README -----------------------------------------------------------------------------------------------------------

def test_readme_is_short():
    assert len(README.read_bytes()) <= 5000

def test_ci_runs_the_readmes_test_command_in_a_fresh_environment():
    ci = (ROOT/'.ci'/'run').read_text()
    assert blocks(README, 'bash')[1].strip() in ci.splitlines() and 'python3 -m venv' in ci

def test_readme_links_files_that_exist():
    for page in (README, CONTRIBUTING):
        for target in re.findall(r'\]\(([^)#]+)', page.read_text()):
            assert '://' in target or (ROOT/target).exists(), (page.name, target)


# ---- commands ---------------------------------------------------------------------------------------------------------

def flags_of(recipe):
    "Every flag of a recipe's parser"
    parser = anno_parser(runpy.run_path(str(ROOT/recipe))['main'].__wrapped__)
    return {o for a in parser._actions for o in a.option_strings}

@pytest.mark.parametrize('page', [*PAGES, CONTRIBUTING], ids=name)
def test_commands_name_recipes_and_flags_that_exist(page):
    for command in (c for b in blocks(page, 'bash') for c in commands(b)):
        words = shlex.split(command)
        recipe = next((w for w in words if w.startswith('recipes/')), None)
        known = COMMANDS if recipe is None else ('python', *COMMANDS)
        assert any(command.startswith(f'{c} ') for c in known) or command in COMMANDS, command
        if recipe is None: continue
        given = {w.partition('=')[0] for w in words[words.index(recipe):] if w.startswith('-')}
        assert given <= flags_of(recipe), (command, given - flags_of(recipe))

@pytest.mark.parametrize('page', PAGES, ids=name)
def test_flags_in_the_text_exist(page):
    "In a table or a sentence, too"
    known = set().union(*(flags_of(f'recipes/{f.name}') for f in (ROOT/'recipes').glob('*.py')))
    others = {'--num_machines', '--cpu', '--multi_gpu', '--help'} # of accelerate, and every program's
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.S | re.M)
    found = {f for code in re.findall(r'`([^`\n]+)`', text) for f in re.findall(r'(?:^|\s)(--[\w-]+)', code)}
    assert found <= known | others, found - known - others


# ---- code -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with the files that the pages name: a data set, photos of two classes, and new photos, single and in a folder"
    place = tmp_path_factory.mktemp('place')
    write_csv_set(place/'my-data', (20, 6, 6))
    for c,hue in (('cat', 0.), ('dog', .5)): write_images(place/'few'/c, [f'{k}.jpg' for k in (1, 2, 3, 4)], 40, 0, hue)
    for new,c in (('new1', 'dog'), ('new2', 'cat')): Image.open(place/'few'/c/'1.jpg').save(place/f'{new}.jpg')
    write_images(place/'new', ['1.jpg', '2.jpg'], 40, 7, .5)
    return place

@pytest.fixture
def short(place, monkeypatch):
    "Fits of one epoch and two episodes, in the folder `place`"
    fit,lr_find,init = FewShotLearner.fit,FewShotLearner.lr_find,EpisodicDL.__init__
    def one_epoch(self, n_epoch, *args, **kwargs): return fit(self, n_epoch if hasattr(self, 'lr_finder') else 1, *args, **kwargs)
    def few_steps(self): return lr_find(self, num_it=30, show_plot=False)
    def few_episodes(self, *args, n_episodes=400, **kwargs): return init(self, *args, n_episodes=min(n_episodes, 2), **kwargs)
    monkeypatch.setattr(FewShotLearner, 'fit', one_epoch)
    monkeypatch.setattr(FewShotLearner, 'lr_find', few_steps)
    monkeypatch.setattr(EpisodicDL, '__init__', few_episodes)
    monkeypatch.setenv('XDG_CACHE_HOME', str(place/'cache'))
    monkeypatch.chdir(place)
    classifiers = list(CLASSIFIERS)
    yield
    for k in CLASSIFIERS.keys() - classifiers: del CLASSIFIERS[k] # what a page registers

@lru_cache
def run(page):
    "The namespace after all Python blocks of a page, top to bottom"
    if page.name in AFTER: run(page.with_name(AFTER[page.name]))
    module = ModuleType(f'page_{page.stem}')
    sys.modules[module.__name__] = module # where timm looks up what it registers
    for block in blocks(page, 'python'):
        if OFFLINE not in block: exec(compile(block, name(page), 'exec'), vars(module))
    return vars(module)

@pytest.mark.parametrize('page', [p for p in PAGES if blocks(p, 'python')], ids=name)
def test_code_runs(page, short):
    run(page)

def test_readmes_code_classifies_photos_and_trains_both_stages(short):
    scope = run(README)
    assert scope['few'].predict(['new1.jpg', 'new2.jpg']) == ['dog', 'cat']
    assert scope['meta'].model.num_features == 64 and len(scope['meta'].recorder.values) == 1

def test_the_packages_weights_load_in_timm_alone(short):
    assert run(ROOT/'docs'/'backbones.md')['h'].shape == (1, 64)

def test_what_the_page_on_extending_makes_is_used(short):
    scope = run(ROOT/'docs'/'extending.md')
    assert 'L_to' in scope['own'].recorder.metric_names
    assert 'L_pairs' in scope['meta'].recorder.metric_names and scope['learn'].model.backbone.num_features == 16
    frames = [pd.read_csv(f'my-data/{s}.csv').assign(split=s) for s in ('train', 'val', 'test')]
    pd.concat(frames).to_csv('labels.csv', index=False)
    df = scope['_one_csv'](Folder('.'), 0, None)
    assert len(df) == 640 and list(df.columns) == ['filename', 'label', 'split', 'path']

def test_contributings_changes_fit_the_code():
    "Every line that a change shows as it is, or takes away, is there, in this order"
    changes = blocks(CONTRIBUTING, 'diff')
    assert len(changes) == 4
    for change in changes:
        head,*lines = change.splitlines()
        code = (ROOT/head.removeprefix('--- a/')).read_text()
        shown = '\n'.join(line[1:] for line in lines if line[:1] in ' -')
        assert code.count(shown + '\n') == 1, change


# ---- the pages --------------------------------------------------------------------------------------------------------

def test_every_backbone_and_classifier_is_listed():
    for k in BACKBONES: assert f'`{k}`' in (ROOT/'docs'/'backbones.md').read_text(), k
    for k in CLASSIFIERS: assert f'`{k}`' in (ROOT/'docs'/'classifiers.md').read_text(), k

def test_every_folder_is_explained():
    page = (ROOT/'docs'/'extending.md').read_text()
    folders = [f for f in (ROOT/'grdd_fastai').iterdir() if f.is_dir() and not f.name.startswith('__')]
    folders += [ROOT/f for f in ('recipes', 'tests', 'benchmarks', 'docs', 'data', 'results', 'weights', 'notebooks')]
    for f in folders: assert f'`{name(f)}/`' in page, f

def test_every_recipe_is_explained():
    page = (ROOT/'docs'/'recipes.md').read_text()
    for f in (ROOT/'recipes').glob('*.py'): assert f'`{f.name}`' in page, f

def test_every_page_is_in_the_navigation():
    nav = (ROOT/'mkdocs.yml').read_text()
    for page in PAGES[1:]: assert page.relative_to(ROOT/'docs').as_posix() in nav, page

def test_the_site_is_built_without_a_warning(tmp_path):
    "The settings and flags of the package, the results and their figures are on it"
    for module in ('mkdocs', 'material', 'mkdocstrings'):
        if find_spec(module) is None: pytest.skip(f"{module} is not installed: pip install -e '.[docs]'")
    done = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '-q', '-d', tmp_path/'site'], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | dict(NO_MKDOCS_2_WARNING='1'), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    def page(of): return (tmp_path/'site'/of/'index.html').read_text()
    assert all(f'<code>{flag}</code>' in page('recipes') for flag in ('--rotation-weight', '--no-decouple', '--max-minutes', '--fp32'))
    assert 'KL(student || teacher)' in page('recipes') and '==SUPPRESS==' not in page('recipes')
    assert (tmp_path/'site'/'results'/'figures'/'figure5.png').exists() and 'Every scoring of the novel classes' in page('results')
    assert 'images per batch, before rotation' in page('reference/data') # a parameter's comment
    fetched = r'<(?:script|link|img)[^>]*(?:src|href)="https?://'
    assert not [f for f in (tmp_path/'site').rglob('*.html') if re.search(fetched, f.read_text())]
    assert not list((tmp_path/'site').rglob('*.py'))


# ---- the code's own rules ---------------------------------------------------------------------------------------------

def test_nothing_imports_a_recipe():
    for f in (ROOT/'grdd_fastai').rglob('*.py'): assert 'import recipes' not in f.read_text() and 'from recipes' not in f.read_text()

def test_dependencies_are_listed_once():
    env = (ROOT/'environment.yml').read_text()
    assert '-e .[dev]' in env and 'torch' not in env


# ---- the notebooks and the wheel ---------------------------------------------------------------------------------------

NOTEBOOKS = sorted((ROOT/'notebooks').glob('*.ipynb'))

def pictures(cells): return [[o for o in c.outputs if 'image/png' in o.get('data', {})] for c in cells]

@pytest.mark.parametrize('file', NOTEBOOKS, ids=name)
def test_a_notebook_is_stored_with_its_outputs_and_nothing_of_the_machine(file):
    nb = nbformat.read(file, as_version=4)
    nbformat.validate(nb)
    code = [c for c in nb.cells if c.cell_type == 'code']
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert any(pictures(code)) or 'own_parts' in file.name
    assert all(o.get('name') != 'stderr' and o.output_type != 'error' for c in code for o in c.outputs)
    assert len(file.read_bytes()) < 400_000 and not re.search(r'/(?:tmp|home|root|work|Users)/', file.read_text())
    assert all(len(line) <= 140 for c in nb.cells for line in c.source.splitlines())

@pytest.mark.slow
@pytest.mark.parametrize('file', NOTEBOOKS, ids=name)
def test_a_notebook_runs_top_to_bottom(file, tmp_path, monkeypatch):
    "On the embedded data set in place of CIFAR-FS; with as many pictures as are stored"
    from nbclient import NotebookClient
    nb = nbformat.read(file, as_version=4)
    code = [c for c in nb.cells if c.cell_type == 'code']
    stored = [len(found) for found in pictures(code)]
    for c in code: c.source,c.outputs = c.source.replace('few_shot_data()', "few_shot_data('demo')"),[]
    (tmp_path/'notebooks').mkdir()
    (tmp_path/'weights').symlink_to(ROOT/'weights')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    NotebookClient(nb, timeout=400, kernel_name='python3', resources={'metadata':{'path':str(tmp_path/'notebooks')}}).execute()
    assert [len(found) for found in pictures(code)] == stored
    if file.stem != 'grdd_in_ten_cells': return
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
    assert not [n for n in names if n.startswith(('tests','recipes','data','docs'))]
    code = f"import sys; sys.path.insert(0, {str(tmp_path/'site')!r}); import grdd_fastai, timm; " \
           "from grdd_fastai.data.class_lists import class_list; " \
           "assert 'site' in grdd_fastai.__file__ and len(class_list('mini_imagenet')) == 100 " \
           "and timm.create_model('convnet4.grdd_cifarfs', pretrained=True).num_features == 64"
    subprocess.run([sys.executable, '-c', code], check=True, cwd=tmp_path, env=os.environ | dict(HF_HUB_OFFLINE='1'))
