"""The house keeps its order: imports go one way, `all` is small, nothing imports a recipe."""
import ast
import subprocess
import sys

import pytest
from helpers import ROOT

PACKAGE = ROOT/'grdd_fastai'
# a module may import from its own floor's room and from lower floors
FLOORS = [{'core'}, {'settings', 'plots'}, {'data', 'models', 'losses'}, {'fewshot'}, {'training', 'photos'}, {'terms'},
          {'distillation', 'runs'}, {'stage_one', 'stage_two'}, {'methods'}, {'grdd', 'distill', 'experiments', 'check_data'}, {'all'}]
FLOOR = {room:i for i,rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(f.relative_to(PACKAGE).with_suffix('') for f in PACKAGE.rglob('*.py') if f.parent != PACKAGE or f.stem != '__init__')


def imported(module):
    "(room, line) of every import from the package in a module"
    for node in ast.walk(ast.parse((PACKAGE/module).with_suffix('.py').read_text())):
        if isinstance(node, ast.Import):
            yield from ((a.name.split('.')[1], node.lineno) for a in node.names if a.name.startswith('grdd_fastai.'))
        if not isinstance(node, ast.ImportFrom): continue
        if node.level == 0:
            if (node.module or '').startswith('grdd_fastai.'): yield node.module.split('.')[1],node.lineno
            continue
        home = module.parts[:len(module.parts) - node.level] # the folder that the dots name
        path = [*home, *(node.module.split('.') if node.module else [])]
        names = [path] if path else [[a.name] for a in node.names if a.name != '__version__']
        yield from ((p[0], node.lineno) for p in names)

def test_every_room_has_a_floor():
    assert {m.parts[0] for m in MODULES} == FLOOR.keys()

@pytest.mark.parametrize('module', MODULES, ids=str)
def test_imports_go_one_way(module):
    room = module.parts[0]
    for other,line in imported(module):
        assert other == room or FLOOR[other] < FLOOR[room] or (room, other) == ('stage_two', 'stage_one'), f'{module}, line {line}: {other}'

def test_all_brings_about_forty_names_and_they_are_all_there():
    import grdd_fastai.all as everything
    assert len(everything.__all__) <= 45 and sorted(everything.__all__) == everything.__all__
    assert all(hasattr(everything, name) for name in everything.__all__)

def test_every_public_name_is_documented():
    import grdd_fastai.all as everything
    for name in everything.__all__:
        thing = getattr(everything, name)
        if callable(thing) and name not in ('sgd', 'muon'): assert (thing.__doc__ or '').strip(), name

def test_nothing_imports_a_recipe():
    for f in PACKAGE.rglob('*.py'): assert 'import recipes' not in f.read_text() and 'from recipes' not in f.read_text()

def test_importing_the_package_registers_the_backbones_and_loads_no_more_than_needed():
    "Each program of its own: the order in which tests import things must not matter"
    for code in ("import timm, grdd_fastai; assert timm.is_model('convnet4')",
                 "from grdd_fastai.fewshot.classifiers import CLASSIFIERS; assert {'cosine', 'tim_adm'} <= CLASSIFIERS.keys()",
                 "import grdd_fastai.stage_one; from fastai.learner import Learner; assert hasattr(Learner, 'fit_poly')"):
        subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)
