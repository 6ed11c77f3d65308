"""The one error a user sees: a sentence that says what, where and what to do."""
from fastcore.script import CliError

__all__ = ['UserError', 'first_line']


class UserError(CliError, ValueError):
    "Something the user can mend; a recipe prints it as the last line on stderr and exits with 1"
    def __init__(self, sentence): super().__init__(sentence); self.sentence = sentence
    def __str__(self): return self.sentence # fastai puts a callback's name into `args`
    def __reduce__(self): return type(self),(self.sentence,)

def first_line(e):
    "What another library's error says, in one line"
    return next(iter(str(e).splitlines()), type(e).__name__)
