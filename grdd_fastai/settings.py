"""Settings that are declared once: name, type, help, bound and default in one line of a dataclass

    @dataclass(frozen=True, kw_only=True)
    class StageOne(Settings):
        lr: Annotated[float, 'initial or highest learning rate', positive] = 0.05

The checks, the flags of every recipe with their help, the identity of a run and the headings of the report follow from that line.
"""
import argparse
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache, wraps
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from .core.errors import UserError

__all__ = ['Settings', 'Bound', 'positive', 'at_least', 'between', 'one_of', 'recorded', 'flag', 'heading', 'declared', 'all_declared',
           'absent', 'from_flags', 'with_flags', 'with_settings', 'checked']

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
        "The value in the declared type; UserError, by the name `called`, unless it has the type and lies within the bound"
        if value is None and self.optional: return None
        kinds = dict(int=Real, float=Real, bool=bool, str=str)
        ok = isinstance(value, kinds[self.kind.__name__]) and (self.kind is bool or not isinstance(value, bool))
        ok = ok and (self.kind is not int or isinstance(value, Integral) or (math.isfinite(value) and value == int(value)))
        ok = ok and not (self.kind is float and math.isnan(value))
        if ok and (self.bound is None or self.bound.holds(value)): return self.kind(value)
        words = dict(int='a whole number', float='a number', bool='True or False', str='text')[self.kind.__name__]
        raise UserError(f'{called or self.name} is {value if isinstance(value, Real) else repr(value)}: '
                        f'it must be {self.bound.words if self.bound else words}')

    def described(self, value):
        "The setting in the words of a heading; '' where its absence in a record means the same"
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
        "The setting as a flag of a program, which is None until it is given; `values` (name of the preset -> value) go into its help"
        shown = {name:('on' if v else 'off') if self.kind is bool else v for name,v in values.items()}
        same = len(set(shown.values())) == 1
        texts = [f'{v}' for v in shown.values()][:1] if same else [f'{name} {v}' for name,v in shown.items()]
        help = self.help if texts == ['None'] else f'{self.help} ({", ".join(texts)})'
        extra = [dict(action=argparse.BooleanOptionalAction)] if self.kind is bool else []
        return inspect.Parameter(self.flag, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[(self.kind, help, *extra)])

def _first(metadata, kind, default=None): return next((o for o in metadata if isinstance(o, kind)), default)

def _setting(name, hint, default):
    kind,*metadata = get_args(hint)
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    record,named = _first(metadata, recorded, recorded()),_first(metadata, flag, flag(name))
    return Setting(name, kinds[0], type(None) in kinds, _first(metadata, str, ''), default, _first(metadata, Bound),
                   record.name or name, record.absent, named.name, _first(metadata, heading))

@cache
def declared(cls):
    "name -> `Setting` of a settings class, without those of its parts"
    hints = get_type_hints(cls, include_extras=True)
    return {f.name:_setting(f.name, hints[f.name], f.default) for f in fields(cls) if get_origin(hints[f.name]) is Annotated}

@cache
def parts(cls):
    "name -> settings class of each part: a field that is itself a settings class, or None where the part is left out"
    hints = get_type_hints(cls)
    kinds = {f.name:(get_args(hints[f.name]) or (hints[f.name],))[0] for f in fields(cls)}
    return {k:kind for k,kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Settings)}

def absent(cls, record):
    "What is not in `record` since its absence means it, by the names that records use; nothing of a part that the record does not have"
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

    def but(self, **changes):
        "A copy with `changes`, also of settings of a part; UserError for a name that is no setting"
        own = {k:v for k,v in changes.items() if k in declared(type(self)) or k in parts(type(self))}
        rest = {k:v for k,v in changes.items() if k not in own}
        for name,cls in parts(type(self)).items():
            theirs = {k:rest.pop(k) for k in list(rest) if k in all_declared(cls)}
            if not theirs: continue
            if getattr(self, name) is None: raise UserError(f'{next(iter(theirs))} is a setting of {cls.__name__}, which is left out here')
            own[name] = getattr(self, name).but(**theirs)
        if rest:
            known = ', '.join(all_declared(type(self)))
            raise UserError(f'{type(self).__name__} has no setting {next(iter(rest))!r}: its settings are {known}')
        return replace(self, **own)

    def value(self, name):
        "The value of a setting, also of a part; None where the part is left out"
        if name in declared(type(self)): return getattr(self, name)
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
        "The settings in words; two that differ are described differently"
        words = [s.described(getattr(self, s.name)) for s in declared(type(self)).values()]
        for name in parts(type(self)):
            if getattr(self, name) is not None: words.append(getattr(self, name).described())
        return ', '.join(w for w in words if w)


# ---- settings as parameters of functions and flags of recipes ---------------------------------------------------------

def from_flags(start, flags):
    "`start` with what is given in `flags` (flag -> value or None) for it; UserError by the name of the flag"
    changes = {}
    for s in all_declared(type(start)).values():
        if flags.get(s.flag) is None: continue
        changes[s.name] = s.checked(flags[s.flag], flag_name(s.flag))
    return start.but(**changes)

def flag_name(parameter): return '--' + parameter.replace('_', '-').lower()

def _with_parameters(f, groups, parameters):
    "`f` with `parameters(group)` in the place of each parameter in `groups`: what is given for them comes to it as a dict"
    own = inspect.signature(f).parameters
    added = {group:[p for p in parameters(cls) if p.name not in own.keys() - groups.keys()] for group,cls in groups.items()}
    names = {p.name for ps in added.values() for p in ps}
    @wraps(f)
    def _f(*args, **kwargs):
        star,keywords = by_keyword(_f, args, kwargs)
        given = {group:{p.name:keywords[p.name] for p in ps if keywords.get(p.name) is not None} for group,ps in added.items()}
        return f(*star, **{k:v for k,v in keywords.items() if k not in names}, **given)
    shown = {}
    for name,p in own.items():
        for q in added.get(name, [p]): shown.setdefault(q.name, q) # a flag that two groups have is one flag
    kinds = sorted(shown.values(), key=lambda p: p.kind)
    _f.__signature__ = inspect.Signature(kinds)
    return _f

def by_keyword(f, args, kwargs):
    "The arguments of a call of `f`: those of its *args, and all others by their names; TypeError as Python's own"
    signature = inspect.signature(f)
    given,star,keywords = signature.bind(*args, **kwargs).arguments,(),{}
    for k,v in given.items():
        kind = signature.parameters[k].kind
        if kind is inspect.Parameter.VAR_POSITIONAL: star = v
        elif kind is inspect.Parameter.VAR_KEYWORD: keywords |= v
        else: keywords[k] = v
    return star,keywords

def with_flags(but=(), **groups) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Decorate a program so that every setting of the `groups` but those in `but` is a flag of it

    A group is parameter -> settings class, or parameter -> presets (name -> settings), whose values the help shows. The parameter
    receives a dict of the flags that are given, for `from_flags`. A flag is None until it is given.
    """
    def parameters(presets):
        flags = all_declared(type(next(iter(presets.values()))))
        return [s.as_flag({name:p.value(s.name) for name,p in presets.items()})
                for s in flags.values() if s.flag and s.flag not in but]
    groups = {k:g if isinstance(g, dict) else {'default':g()} for k,g in groups.items()}
    return lambda f: _with_parameters(f, groups, parameters)

def with_settings(only=None, but=(), **groups) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Decorate a function so that every setting of the classes `groups` (parameter -> class), `only` some or all `but` some, is a keyword

    The parameter receives the settings object that the keywords make. UserError for a keyword that is out of bounds.
    """
    def parameters(cls): return [s.as_keyword() for s in all_declared(cls).values() if s.name in (only or [s.name]) and s.name not in but]
    def decorate(f):
        @wraps(f)
        def made(*args, **kwargs): return f(*args, **kwargs | {k:cls().but(**kwargs[k]) for k,cls in groups.items()})
        return _with_parameters(made, groups, parameters)
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
