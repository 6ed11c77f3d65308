"""Progress bars where somebody sees them."""
import sys

from fastcore.imports import IN_NOTEBOOK
from fastprogress.fastprogress import progress_bar

__all__ = ['with_progress']


def with_progress(items, least:int=0):
    "The list `items`, with a progress bar in a notebook or a terminal if it has at least `least` of them"
    return progress_bar(items) if len(items) >= least and (IN_NOTEBOOK or sys.stderr.isatty()) else items
