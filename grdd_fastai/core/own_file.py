"""Python files of the user's own, which hold classifiers and methods."""
import importlib.util
import sys

from .errors import UserError, first_line
from .storage import user_path

__all__ = ['module_of']


LOADED = {} # path of a file -> its module; a file is run only once

def module_of(file):
    "The module in a file of one's own; UserError if the file cannot be run"
    path = user_path(file).resolve()
    if path not in LOADED:
        try:
            spec = importlib.util.spec_from_file_location(f'file_{path.stem}', path)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec) # `inspect` finds its code there
            spec.loader.exec_module(module)
        except Exception as e:
            sys.modules.pop(f'file_{path.stem}', None)
            raise UserError(f'{file} cannot be used ({type(e).__name__}: {first_line(e)}): mend it, or give another file') from None
        LOADED[path] = module
    return LOADED[path]
