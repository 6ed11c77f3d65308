"""The types of the public names, as a type checker sees them."""
import re
import subprocess
import sys

import pytest
from helpers import ROOT

import grdd_fastai.all as everything


def test_a_type_checker_knows_the_types_of_all_names(tmp_path):
    "No parameter and no result of a function is untyped, but for **kwargs and what comes from fastai, which has no types"
    pytest.importorskip('mypy', reason='mypy is not installed')
    (tmp_path/'names.py').write_text('\n'.join(['from grdd_fastai.all import *', *(f'reveal_type({n})' for n in everything.__all__)]))
    options = ['--ignore-missing-imports', '--follow-imports=silent', '--cache-dir', tmp_path/'cache']
    done = subprocess.run([sys.executable, '-m', 'mypy', *options, tmp_path/'names.py'], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    revealed = dict(zip(everything.__all__, re.findall('Revealed type is "(.*)"', done.stdout)))
    assert len(revealed) == len(everything.__all__)
    for name,text in revealed.items():
        assert text != 'Any', f'{name} has no type'
        parameters = re.findall(r'[(,] (\w+): Any(?: =)?(?=[,)])', f', {text[4:]}') if text.startswith('def') else []
        assert set(parameters) <= {'dataset', 'dl', 'dls', 'arch', 'student'}, (name, parameters) # fastai's own
