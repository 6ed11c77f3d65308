"""The one error a user sees: a sentence that says what, where and what to do."""
from fastcore.script import CliError

__all__ = ['UserError', 'first_line']


class UserError(CliError, ValueError):
    "Something the user can mend; a recipe prints it as the last line on stderr and exits with 1"
    def __init__(self, sentence):
        self.sentence = one_line(sentence)
        super().__init__(self.sentence)
    def __str__(self): return self.sentence # fastai puts a callback's name into `args`
    def __reduce__(self): return type(self),(self.sentence,)

def one_line(text, most=600):
    "`text` with its control characters spelled out, and its middle left out where it is long: it may quote a stranger's file"
    text = ''.join(ch if ch.isprintable() else repr(ch)[1:-1] for ch in str(text))
    return text if len(text) <= most else f'{text[:most//2]} ... {text[-most//2:]}'

def first_line(e):
    "What another library's error says, in one line"
    return next(iter(str(e).splitlines()), type(e).__name__)
