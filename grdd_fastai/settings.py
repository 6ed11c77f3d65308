"""Settings that are declared once: name, type, help, bound and default in one line of a dataclass

    @dataclass(frozen=True, kw_only=True)
    class StageOne(Settings):
        lr: Annotated[float, 'initial or highest learning rate', positive] = 0.05

The checks, the flags of every recipe with their help, the identity of a run and the headings of the report follow from that line.
"""
import argparse
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache, wraps
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from fastcore.script import anno_parser, is_cli

from .core.errors import UserError

__all__ = ['Settings', 'Bound', 'positive', 'at_least', 'between', 'one_of', 'recorded', 'flag', 'heading', 'declared', 'all_declared',
           'absent', 'from_flags', 'with_flags', 'with_settings', 'checked',
           'exact_flags', 'FORMER_FLAGS']

MISSING = inspect.Parameter.empty
R = TypeVar('R')


# ---- what a declaration says besides the type and the help ------------------------------------------------------------

class Bound(NamedTuple):
    "What a value has to be, in words and as a check"
    words: str
    holds: Callable[[Any], bool]

positive = Bound('positive', lambda v: 0 < v < math.inf)
def at_least(low, below=math.inf):
    "Bound: from `low` on, and below `below` where it is given"
    return Bound(f'at least {low}' + ('' if below == math.inf else f' and below {below}'), lambda v: low <= v < below)
def between(low, high): return Bound(f'from {low} to {high}', lambda v: low <= v <= high)
def one_of(*choices): return Bound('one of ' + ', '.join(choices), lambda v: v in choices)

class recorded(NamedTuple):
    """How records know a setting

    `name` is its name there. `absent` is the value of the records that were made before the setting existed: at this value it stays out
    of the record and of the folder's name, so that older runs are still found.
    """
    name: str|None = None
    absent: Any = MISSING

class flag(NamedTuple):
    "The setting's flag where it differs from its name; None for a setting that has no flag"
    name: str|None

class heading(NamedTuple):
    "How the report words the setting: a text with {} for the value, or a function of the value that returns a text"
    words: str|Callable[[Any], str]


# ---- one setting ------------------------------------------------------------------------------------------------------

TYPE_WORDS = {int:'a whole number', float:'a finite number', bool:'True or False', str:'text'}

class Setting(NamedTuple):
    "A declared setting"
    name: str
    kind: type # int, float, bool or str
    optional: bool # whether it may be None
    help: str
    default: Any
    bound: Bound|None
    recorded: str # name in records
    absent: Any # value that an absence in a record means
    flag: str|None # parameter of the programs, which is also the flag
    heading: heading|None

    def checked(self, value, called=None):
        "The value in the declared type; UserError, which uses the name `called`, unless it has the type and lies within the bound"
        if value is None and self.optional: return None
        if self._has_type(value) and (self.bound is None or self.bound.holds(value)): return self.kind(value)
        words = self.bound.words if self.bound else ''
        if not (self._has_type(value) or words.startswith('one of')): words = ', '.join(w for w in (TYPE_WORDS[self.kind], words) if w)
        raise UserError(f'{called or self.name} is {value if isinstance(value, Real) else repr(value)}: it must be {words}')

    def _has_type(self, value):
        if self.kind is bool: return isinstance(value, bool | np.bool_)
        if self.kind is str: return isinstance(value, str)
        if not isinstance(value, Real) or isinstance(value, bool | np.bool_): return False
        if isinstance(value, Integral): return abs(value) < 10**300 # which a float can hold
        return math.isfinite(value) and (self.kind is float or value == int(value))

    def described(self, value):
        "The words for the report; empty if the value is the one that older records mean"
        if self.heading:
            words = self.heading.words
            return words.format(value) if isinstance(words, str) else words(value)
        if value == self.absent: return ''
        if self.kind is bool: return self.name if value else f'no {self.name}'
        return f'{self.name} {value}'

    def as_keyword(self):
        "The setting as a parameter of a function, with its default"
        annotation = Annotated[self.kind, self.help]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=annotation)

    def as_flag(self, values):
        "The setting as a flag of a program, default None; `values` (name of the preset -> value) go into its help"
        shown = {name:('on' if v else 'off') if self.kind is bool else str(v) for name,v in values.items() if v is not None}
        demo = shown.pop('demo', None)
        texts = [f'{name} {v}' for name,v in shown.items()] if len(set(shown.values())) > 1 else list(shown.values())[:1]
        if demo is not None and set(shown.values()) != {demo}: texts.append(f'demo {demo}')
        help = f'{self.help} ({", ".join(texts)})' if texts else self.help
        extra = [dict(action=argparse.BooleanOptionalAction)] if self.kind is bool else []
        return inspect.Parameter(self.flag, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[(self.kind, help, *extra)])

def _first(metadata, kind, default=None): return next((o for o in metadata if isinstance(o, kind)), default)

def _setting(name, hint, default):
    kind,*metadata = get_args(hint)
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if kinds[0] not in TYPE_WORDS or set(kinds[1:]) - {type(None)}: raise TypeError(f'{name}: a setting is an int, float, bool or str')
    record,named = _first(metadata, recorded, recorded()),_first(metadata, flag, flag(name))
    return Setting(name, kinds[0], type(None) in kinds, _first(metadata, str, ''), default, _first(metadata, Bound),
                   record.name or name, record.absent, named.name, _first(metadata, heading))

@cache
def declared(cls):
    "name -> `Setting` of a settings class, without those of its parts"
    if '__dataclass_fields__' not in vars(cls): raise TypeError(f'{cls.__name__} is no dataclass: decorate it as Settings is')
    hints = get_type_hints(cls, include_extras=True)
    plain = [f.name for f in fields(cls) if get_origin(hints[f.name]) is not Annotated and f.name not in parts(cls)]
    if plain: raise TypeError(f'{cls.__name__}.{plain[0]} is neither Annotated nor a class of settings')
    return {f.name:_setting(f.name, hints[f.name], f.default) for f in fields(cls) if get_origin(hints[f.name]) is Annotated}

@cache
def parts(cls):
    "name -> settings class of each part: a field that is itself a settings class, or None where the part is left out"
    hints = get_type_hints(cls)
    kinds = {f.name:(get_args(hints[f.name]) or (hints[f.name],))[0] for f in fields(cls)}
    return {k:kind for k,kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Settings)}

def absent(cls, record):
    """The settings that `recorded` leaves out, by the names that records use, with the values that this means

    A part of which the record has no setting is skipped.
    """
    found = {s.recorded:s.absent for s in declared(cls).values() if s.absent is not MISSING}
    for part in parts(cls).values():
        if any(s.recorded in record for s in all_declared(part).values()): found |= absent(part, record)
    return found

def all_declared(cls):
    "name -> `Setting` of a settings class and of its parts"
    return declared(cls) | {k:s for part in parts(cls).values() for k,s in all_declared(part).items()}


# ---- a class of settings ----------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that are checked when they are made and that never change: `but` makes a copy with other values

    A subclass is a dataclass whose fields are `Annotated[type, 'help', ...]`; the metadata may hold a `Bound`, `recorded`, `flag` and
    `heading`. A field may also be another `Settings`, or None: a part, whose settings count as its own.
    """
    def __post_init__(self):
        for s in declared(type(self)).values(): object.__setattr__(self, s.name, s.checked(getattr(self, s.name)))
        for name,cls in parts(type(self)).items():
            part = getattr(self, name)
            if not isinstance(part, cls | None): raise UserError(f'{name} is a {type(part).__name__}: give {cls.__name__}(...) or None')

    def but(self, **changes):
        "A copy with `changes`, also of settings of a part; UserError for a name that is no setting"
        own = {k:v for k,v in changes.items() if k in declared(type(self)) or k in parts(type(self))}
        rest = {k:v for k,v in changes.items() if k not in own}
        for name,cls in parts(type(self)).items():
            theirs = {k:rest.pop(k) for k in list(rest) if k in all_declared(cls)}
            if not theirs: continue
            part = own.get(name, getattr(self, name))
            if part is None: raise UserError(f'{next(iter(theirs))} is a setting of {cls.__name__}, which is left out here')
            own[name] = part.but(**theirs)
        if rest:
            known = ', '.join([*all_declared(type(self)), *parts(type(self))])
            raise UserError(f'{type(self).__name__} has no setting {next(iter(rest))!r}: its settings are {known}')
        return replace(self, **own)

    def value(self, name):
        "The value of a setting, also of a part; None where the part is left out"
        if name in declared(type(self)): return getattr(self, name)
        if name not in all_declared(type(self)): raise UserError(f'{type(self).__name__} has no setting {name!r}')
        part = next(getattr(self, k) for k,cls in parts(type(self)).items() if name in all_declared(cls))
        return part and part.value(name)

    def values(self):
        "name -> value of all settings, also of the parts that are there"
        found = {k:getattr(self, k) for k in declared(type(self))}
        for name in parts(type(self)):
            if getattr(self, name) is not None: found |= getattr(self, name).values()
        return found

    def recorded(self):
        "The settings as records name them, JSON-able; one whose absence means the same is left out"
        found = {s.recorded:getattr(self, s.name) for s in declared(type(self)).values() if getattr(self, s.name) != s.absent}
        for name in parts(type(self)):
            if getattr(self, name) is not None: found |= getattr(self, name).recorded()
        return found

    @classmethod
    def from_record(cls, record):
        """The settings of which `record` is the record; a part of which the record has nothing is left out

        Other entries of the record are not looked at. UserError if a setting is missing that has no meaning when it is absent.
        """
        found = {}
        for s in declared(cls).values():
            if s.recorded not in record and s.absent is MISSING: raise UserError(f'the record has no {s.recorded}: take it from a copy')
            found[s.name] = record.get(s.recorded, s.absent)
        for name,part in parts(cls).items():
            there = any(s.recorded in record for s in all_declared(part).values())
            found[name] = part.from_record(record) if there else None
        return cls(**found)

    def described(self):
        "The settings in words; two that differ in more than the seed are described differently"
        words = [s.described(getattr(self, s.name)) for s in declared(type(self)).values()]
        for name in parts(type(self)):
            if getattr(self, name) is not None: words.append(getattr(self, name).described())
        return ', '.join(w for w in words if w)


# ---- settings as parameters of functions and flags of recipes ---------------------------------------------------------

def from_flags(start, flags):
    "A copy of `start` with the values in `flags` (flag -> value or None) that are given; UserError with the name of the flag"
    changes = {}
    for s in all_declared(type(start)).values():
        if flags.get(s.flag) is None: continue
        changes[s.name] = s.checked(flags[s.flag], flag_name(s.flag))
    return start.but(**changes)

def flag_name(parameter): return '--' + parameter.replace('_', '-').lower()

def _with_parameters(f, groups, parameters, keep_none=False):
    "Replace each parameter in `groups` by the `parameters` of its group; `f` gets the given ones as a dict"
    own = inspect.signature(f).parameters
    if missing := groups.keys() - own.keys(): raise TypeError(f'{f.__name__} has no parameter {missing.pop()}')
    added = {group:parameters(cls) for group,cls in groups.items()}
    names = {p.name for ps in added.values() for p in ps}
    if twice := names & (own.keys() - groups.keys()): raise TypeError(f'{f.__name__} has a parameter {twice.pop()} of its own')
    @wraps(f)
    def _f(*args, **kwargs):
        star,keywords = by_keyword(_f, args, kwargs)
        given = {group:{p.name:keywords[p.name] for p in ps if p.name in keywords and (keep_none or keywords[p.name] is not None)}
                 for group,ps in added.items()}
        return f(*star, **{k:v for k,v in keywords.items() if k not in names}, **given)
    shown = {}
    for name,p in own.items():
        for q in added.get(name, [p]): shown.setdefault(q.name, q) # a flag that two groups have is one flag
    _f.__signature__ = inspect.Signature(sorted(shown.values(), key=lambda p: p.kind))
    return _f

def by_keyword(f, args, kwargs):
    "(values of *args, all other arguments by name) of a call of `f`; TypeError as Python raises it"
    signature = inspect.signature(f)
    try: given = signature.bind(*args, **kwargs).arguments
    except TypeError as e: raise TypeError(f'{f.__name__}() {e}') from None
    star,keywords = (),{}
    for k,v in given.items():
        kind = signature.parameters[k].kind
        if kind is inspect.Parameter.VAR_POSITIONAL: star = v
        elif kind is inspect.Parameter.VAR_KEYWORD: keywords |= v
        else: keywords[k] = v
    return star,keywords

def chosen(cls, only, but):
    "The settings of a class and its parts, `only` some or all `but` some; TypeError for a name that is none"
    settings = all_declared(cls)
    if wrong := {*(only or ()), *but} - settings.keys(): raise TypeError(f'{cls.__name__} has no setting {wrong.pop()}')
    return [s for s in settings.values() if s.name in (only or settings) and s.name not in but]

def with_flags(but=(), **groups) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Decorate a program so that every setting of the `groups` but those in `but` is a flag of it

    A group is parameter -> settings class, or parameter -> presets (name -> settings), whose values the help shows. The parameter
    receives a dict of the flags that are given, for `from_flags`. The default of a flag is None.
    """
    def parameters(presets):
        settings = chosen(type(next(iter(presets.values()))), None, ())
        return [s.as_flag({name:p.value(s.name) for name,p in presets.items()}) for s in settings if s.flag and s.flag not in but]
    groups = {k:g if isinstance(g, dict) else {'default':g()} for k,g in groups.items()}
    return lambda f: _with_parameters(f, groups, parameters)

def with_settings(only=None, but=(), **groups) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Decorate a function so that every setting of the classes `groups` (parameter -> class), `only` some or all `but` some, is a keyword

    The parameter receives the settings object that the keywords make. UserError for a keyword that is out of bounds.
    """
    def parameters(cls): return [s.as_keyword() for s in chosen(cls, only, but)]
    def decorate(f):
        @wraps(f)
        def made(*args, **kwargs): return f(*args, **kwargs | {k:cls().but(**kwargs[k]) for k,cls in groups.items()})
        return _with_parameters(made, groups, parameters, keep_none=True)
    return decorate

def checked(f:Callable[..., R]) -> Callable[..., R]:
    "Check the bounds that are declared in the annotations of a program's own parameters: UserError by the name of the flag"
    @cache
    def own():
        hints = get_type_hints(inspect.unwrap(f), include_extras=True)
        return {k:_setting(k, h, None)._replace(optional=True) for k,h in hints.items() if get_origin(h) is Annotated}
    @wraps(f)
    def _f(*args, **kwargs):
        star,keywords = by_keyword(f, args, kwargs)
        for k,s in own().items():
            if k in keywords: keywords[k] = s.checked(keywords[k], flag_name(k))
        return f(*star, **keywords)
    return _f

FORMER_FLAGS = {'--classifier':'--head', '--reading':'--preset', '--per-step':'--episodes-per-step'} # of version 0.1

def exact_flags(main):
    "Decorate the `main` of a recipe so that a flag is not taken for the beginning of another one: UserError for an unknown flag"
    @wraps(main)
    def _f(*args, **kwargs):
        if is_cli():
            known = {name for action in anno_parser(main)._actions for name in action.option_strings}
            given = (word.partition('=')[0] for word in sys.argv[1:] if word.startswith('--') and word != '--')
            if unknown := next((name for name in given if name not in known), None):
                now = FORMER_FLAGS.get(unknown)
                raise UserError(f'there is no flag {unknown}: ' + (f'it is called {now} now' if now in known else '--help lists the flags'))
        return main(*args, **kwargs)
    return _f
