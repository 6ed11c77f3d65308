"""Settings declared once: checks, copies, records and flags follow from the declaration."""
import hashlib
import json
from dataclasses import dataclass
from typing import Annotated

import pytest
from fastcore.script import anno_parser
from helpers import ROOT, recipe, shell

from grdd_fastai.core.errors import UserError
from grdd_fastai.experiments.report.methods import EXPERIMENTS
from grdd_fastai.settings import (
    Settings,
    all_declared,
    at_least,
    checked,
    flag,
    from_flags,
    heading,
    one_of,
    positive,
    recorded,
    with_flags,
    with_settings,
)
from grdd_fastai.stage_one import StageOne
from grdd_fastai.stage_two import PRESETS, StageTwo, get_preset

COMPARED = sorted(p for k in EXPERIMENTS for p in (ROOT/'results'/k).glob('*.json')) # records of methods side by side
RECORDS = sorted({*(ROOT/'results').glob('*/*.json')} - {*COMPARED})


@dataclass(frozen=True, kw_only=True)
class Inner(Settings):
    T: Annotated[float, 'temperature', positive] = 0.1
    squared: Annotated[bool, 'weight by T squared', recorded('hinton'), flag('t_squared')] = False

@dataclass(frozen=True, kw_only=True)
class Outer(Settings):
    lr: Annotated[float, 'rate', positive] = 0.05
    bs: Annotated[int|None, 'batch', at_least(1)] = None
    kind: Annotated[str, 'kind', one_of('a', 'b'), recorded(absent='a'), heading('of kind {}')] = 'a'
    inner: Inner|None = Inner()


# ---- one class --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('change, says', [
    (dict(lr=-1), 'lr is -1: it must be positive'), (dict(lr='x'), "lr is 'x': it must be a finite number, positive"),
    (dict(lr=float('nan')), 'lr is nan'), (dict(lr=float('inf')), 'lr is inf'), (dict(lr=10**400), 'lr is 1000'),
    (dict(lr=True), 'lr is True'), (dict(bs=1.5), 'bs is 1.5: it must be a whole number, at least 1'),
    (dict(bs=0), 'bs is 0'), (dict(kind='c'), "kind is 'c': it must be one of a, b"),
    (dict(squared=1), 'squared is 1: it must be True or False'),
    (dict(lrr=1), "Outer has no setting 'lrr': its settings are lr, bs, kind, T, squared, inner"),
    (dict(inner=3), 'inner is a int: give Inner(...) or None'),
    (dict(inner=None, T=1.), 'T is a setting of Inner, which is left out here')])
def test_what_is_out_of_bounds_is_one_sentence(change, says):
    with pytest.raises(UserError) as e: Outer().but(**change)
    assert str(e.value).startswith(says) and '\n' not in str(e.value)

def test_numbers_take_the_declared_type():
    s = Outer(lr=1, bs=8.)
    assert isinstance(s.lr, float) and isinstance(s.bs, int) and json.dumps(s.recorded()) == json.dumps(Outer(lr=1., bs=8).recorded())

def test_settings_never_change_and_a_copy_may_change_a_part():
    s = Outer()
    with pytest.raises(AttributeError): s.lr = 1.
    t = s.but(T=3, lr=.2)
    assert (t.inner.T, t.lr, s.inner.T, s.lr) == (3., .2, .1, .05) and t.value('T') == 3. and s.but() == s

def test_a_part_that_is_given_is_changed_further():
    assert Outer().but(inner=Inner(T=4.), squared=True) == Outer(inner=Inner(T=4., squared=True))

def test_a_declaration_that_is_none_is_an_error_of_the_program():
    @dataclass(frozen=True, kw_only=True)
    class Plain(Settings):
        extra: int = 3
    class Undecorated(Settings):
        extra: Annotated[int, 'more'] = 3
    @dataclass(frozen=True, kw_only=True)
    class Wrong(Settings):
        extra: Annotated[list|None, 'more'] = None
    for cls,says in ((Plain, 'Plain.extra is neither'), (Undecorated, 'Undecorated is no dataclass'),
                     (Wrong, 'extra: a setting is an int')):
        with pytest.raises(TypeError, match=says): cls()

def test_names_that_clash_are_an_error_of_the_program():
    with pytest.raises(TypeError, match='has no parameter s'): with_settings(s=Outer)(lambda x: x)
    with pytest.raises(TypeError, match='has a parameter lr of its own'): with_settings(s=Outer)(lambda lr, s: s)
    with pytest.raises(TypeError, match='Outer has no setting lrr'): with_settings(s=Outer, only=('lrr',))(lambda s: s)

def test_a_part_that_is_left_out_takes_no_settings():
    with pytest.raises(UserError, match='T is a setting of Inner, which is left out here'): Outer(inner=None).but(T=1.)
    assert Outer(inner=None).value('T') is None

def test_a_record_has_the_recorded_names_and_leaves_out_what_an_absence_means():
    assert Outer().recorded() == dict(lr=.05, bs=None, T=.1, hinton=False)
    assert Outer(kind='b', inner=None).recorded() == dict(lr=.05, bs=None, kind='b')

@pytest.mark.parametrize('s', [Outer(), Outer(kind='b', bs=3), Outer(inner=None), Outer(inner=Inner(T=4, squared=True))])
def test_a_record_gives_the_settings_back(s): assert Outer.from_record(json.loads(json.dumps(s.recorded()))) == s

def test_a_record_that_lacks_a_setting_is_one_sentence():
    with pytest.raises(UserError, match='the record has no lr'): Outer.from_record(dict(bs=3))

@pytest.mark.parametrize('cls', [StageOne, StageTwo])
def test_settings_that_differ_are_described_differently(cls):
    "For each setting but the seed: another value gives another description"
    for s in all_declared(cls).values():
        if s.name == 'seed': continue
        start = cls().but(teacher_view='views') if s.name == 'views' else cls() # without effect otherwise
        value = start.value(s.name)
        if s.kind is bool: other = not value
        elif s.kind is str: other = next(c for c in (s.bound.words.removeprefix('one of ').split(', ') if s.bound else ['x']) if c != value)
        else: other = next(v for v in ((value or 7) + 1, 1) if not s.bound or s.bound.holds(v)) if s.kind is int else (value or .5)/2
        changed = start.but(**{s.name:other})
        assert changed != start and changed.described() != start.described(), s.name


# ---- the committed records --------------------------------------------------------------------------------------------

def settings_of(record): return StageOne.from_record(record) if 'arch' in record else StageTwo.from_record(record)

def test_there_are_records(): assert len(RECORDS) > 50

def run_of(settings, fingerprint):
    "How the name of the run with these settings ends"
    return '-' + hashlib.sha256(json.dumps([settings, fingerprint], sort_keys=True).encode()).hexdigest()[:8]

@pytest.mark.parametrize('path', COMPARED, ids=lambda p: p.stem)
def test_every_record_of_a_method_keeps_its_identity(path):
    "The name of each run follows from the recorded settings, which are the same when they are read and recorded again"
    r = json.loads(path.read_text())
    for k,network in r['networks'].items():
        settings = r['settings'] if k == 'net' else r['settings'][k]
        assert network['run'].endswith(run_of(settings, r['data']['fingerprint']))
        if 'method' in settings: continue
        own = {k:v for k,v in settings.items() if k not in ('terms', 'start', 'teacher', 'student')}
        assert settings_of(own).recorded() == own

@pytest.mark.parametrize('path', RECORDS, ids=lambda p: p.stem)
def test_every_record_keeps_its_identity(path):
    "Read as settings and recorded again it is the same, and names the folder of the run that made it"
    r = json.loads(path.read_text())
    def again(record):
        if record.keys() == {'arch'}: return record # a network of random weights
        parts = {k:v and again(v) for k,v in record.items() if k in ('student', 'teacher')}
        return settings_of(record).recorded() | parts
    assert again(r['settings']) == r['settings']
    assert r['networks']['net']['run'].endswith(run_of(again(r['settings']), r['data']['fingerprint']))
    trained = r['supervision'].split('+')
    s = settings_of(r['settings'])
    assert ('CL' in trained) == (r['settings'].get('init') != 'random')
    if 'arch' in r['settings']: assert trained == ['CL']
    else: assert ('GR' in trained) == bool(s.distill and s.distill.kl_weight) and ('EL' in trained) == (len({*trained} - {'CL', 'EL'}) == 0)


# ---- flags and keywords -----------------------------------------------------------------------------------------------

@checked
@with_flags(two=dict(x=Outer(), y=Outer(lr=1)))
def program(way:Annotated[int, 'classes', at_least(2)]=5, two=None, out:str=None, # a folder
):
    return way,from_flags(Outer(), two),out

def test_every_setting_is_a_flag_with_its_help_and_the_presets_values():
    text = anno_parser(program).format_help()
    for words in ('--lr (float)', 'rate (x 0.05, y 1.0)', '--bs (int)', '--t-squared, --no-t-squared', 'weight by T squared (off)',
                  'temperature (0.1)'):
        assert words in text, (words, text)
    args = vars(anno_parser(program).parse_args(['--t', '3', '--no-t-squared', '--out', 'o']))
    assert (args['T'], args['t_squared'], args['lr'], args['out']) == (3., False, None, 'o')

def test_a_flag_that_is_given_changes_its_setting_alone():
    assert program(3, T=2., t_squared=True, out='o') == (3, Outer(inner=Inner(T=2., squared=True)), 'o')
    assert program() == (5, Outer(), None)

@pytest.mark.parametrize('given, says', [(dict(lr=-1), '--lr is -1: it must be positive'),
                                         (dict(way=1), '--way is 1: it must be at least 2'), (dict(way='x'), "--way is 'x'"),
                                         (dict(kind='z'), "--kind is 'z': it must be one of a, b")])
def test_a_flag_out_of_bounds_is_named(given, says):
    with pytest.raises(UserError, match=says): program(**given)

def test_an_unknown_keyword_is_pythons_own_error():
    with pytest.raises(TypeError, match='whey'): program(whey=3)

@with_settings(s=Outer, but=('bs',))
def function(x, s, y=2, **kwargs):
    "A function"
    return x,s,y,kwargs

def test_keywords_make_the_settings_of_a_function():
    assert function(1, T=2., y=3, z=4) == (1, Outer(inner=Inner(T=2.)), 3, dict(z=4))
    with pytest.raises(UserError, match='T is 0: it must be positive'): function(1, T=0)


def test_a_flag_is_not_taken_for_the_beginning_of_another(tmp_path):
    "argparse would read --classifier as --classifiers"
    for flags,says in ((['--classifier', 'cosine'], 'there is no flag --classifier: it is called --head now'),
                       (['--meta-epoch=3'], 'there is no flag --meta-epoch: --help lists the flags')):
        done = shell('recipes/cifarfs_5w1s.py', '--demo', '--out', tmp_path/'run', *flags)
        assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == says and not (tmp_path/'run').exists()

@pytest.mark.parametrize('name', ['table2', 'ablations', 'sweep', 'pairs', 'readings', 'figures'])
def test_a_flag_of_an_experiment_changes_something(name):
    "The rows of `readings` set stage two themselves: it offers no flag that they would replace"
    flags = {o for a in anno_parser(recipe(name).__wrapped__)._actions for o in a.option_strings}
    assert ('--kl-weight' in flags) == ('--preset' in flags) == (name != 'readings')
    assert {'--head', '--jitter', '--augment', '--smoothing'} <= flags and ('--seed' in flags) == (name == 'figures')


# ---- the stages -------------------------------------------------------------------------------------------------------

def test_a_preset_is_known_by_name_and_cl_el_has_rates_of_its_own():
    assert get_preset('best') == StageTwo() and get_preset('best', labels_alone=True).lr == 1e-2 and get_preset('paper').distill.T == 4.
    with pytest.raises(UserError, match="unknown preset 'worst': it is one of best, muon, patient, paper"): get_preset('worst')

def test_every_flag_belongs_to_one_setting_or_to_both_stages():
    one,two = ({s.flag:s for s in all_declared(cls).values() if s.flag} for cls in (StageOne, StageTwo))
    assert {k for k in one.keys() & two.keys()} == {'jitter', 'augment', 'seed'}
    assert all(s.help for s in (*one.values(), *two.values())) and len(PRESETS) == 4
