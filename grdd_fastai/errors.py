"""The one error a user sees: a sentence that says what, where and what to do."""
from fastcore.script import CliError

__all__ = ['UserError']


class UserError(CliError, ValueError):
    "Something the user can mend; a recipe prints it as the last line on stderr and exits with 1"
