"""The reference describes a parameter by the comment beside it, as fastai's documentation does, and a setting by its declaration."""
import inspect
import re
from importlib import import_module
from typing import Annotated, get_args, get_origin

import griffe
from fastcore.docments import docments

from grdd_fastai.settings import Settings, declared

SELF = ('self', 'cls')


def imported(o):
    "The Python object of a griffe object, or None"
    path,names = o.module.path,o.path.removeprefix(o.module.path + '.').split('.')
    try:
        found = import_module(path)
        for name in names: found = getattr(found, name)
        return found
    except (ImportError, AttributeError): return None

def words(annotation):
    "An annotation as text, without modules and without what `Annotated` adds to it"
    if annotation is inspect.Parameter.empty: return None
    if get_origin(annotation) is Annotated: annotation = get_args(annotation)[0]
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r'\b\w+\.', '', text)

def parameters(f):
    "(parameter, description) of each parameter of a function, of those too that a decorator adds"
    comments = docments(inspect.unwrap(f), returns=False)
    for k,p in inspect.signature(f).parameters.items():
        meta = get_args(p.annotation)[1:] if get_origin(p.annotation) is Annotated else ()
        yield p,comments.get(k) or next((m for m in meta if isinstance(m, str)), None)


class Docments(griffe.Extension):
    def on_function_instance(self, *, func, **kwargs):
        f = imported(func)
        if not inspect.isfunction(f): return
        found = list(parameters(f))
        if [p.name for p,_ in found] != [p.name for p in func.parameters]: # a decorator made the settings its keywords
            kinds = {p.kind:griffe.ParameterKind[p.kind.name.lower()] for p,_ in found}
            func.parameters = griffe.Parameters(*[griffe.Parameter(
                p.name, annotation=words(p.annotation), kind=kinds[p.kind],
                default=None if p.default is inspect.Parameter.empty else repr(p.default)) for p,_ in found])
        described = [(p, text) for p,text in found if text and p.name not in SELF]
        if not described: return
        if func.docstring is None: func.docstring = griffe.Docstring('', parent=func)
        func.docstring.parsed.append(griffe.DocstringSectionParameters([griffe.DocstringParameter(
            p.name, description=' '.join(text.split()), annotation=words(p.annotation),
            value=None if p.default is inspect.Parameter.empty else repr(p.default)) for p,text in described]))

    def on_class_members(self, *, cls, **kwargs):
        "A settings class is described by a table of its settings"
        c = imported(cls)
        if not (inspect.isclass(c) and issubclass(c, Settings) and declared(c)): return
        rows = []
        for s in declared(c).values():
            annotation = s.kind.__name__ + (' | None' if s.optional else '')
            cls.members[s.name].annotation = annotation
            rows.append(griffe.DocstringParameter(s.name, description=s.help, annotation=annotation, value=repr(s.default)))
        cls.docstring.parsed.append(griffe.DocstringSectionParameters(rows, title='Settings:'))
