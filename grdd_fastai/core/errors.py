"""The one error that a user sees: a sentence that says what is wrong, where it is and what to do."""
from fastcore.script import CliError

__all__ = ['UserError', 'first_line']


class UserError(CliError, ValueError):
    "An error that the user can mend; a recipe prints its sentence as the last line on stderr and exits with code 1"
    def __init__(self, sentence:str):
        self.sentence = one_line(sentence)
        super().__init__(self.sentence)
    def __str__(self): return self.sentence # `args` would hold more, because fastai adds a callback's name to it
    def __reduce__(self): return type(self),(self.sentence,)

def one_line(text, most=600):
    "Spell out the control characters of `text` and leave out the middle of a long one, because it may quote a stranger's file"
    text = ''.join(ch if ch.isprintable() else repr(ch)[1:-1] for ch in str(text))
    return text if len(text) <= most else f'{text[:most//2]} ... {text[-most//2:]}'

def first_line(e):
    "The first line of another library's error, or the error's type if it says nothing"
    return next(iter(str(e).splitlines()), type(e).__name__)

def reason(e):
    "The reason that an error gives, without the number and the path that an OSError adds to it"
    return getattr(e, 'strerror', None) or str(e)
