"""The one exception a user is meant to read.

Owns: the rule that a failure is one line saying what, where, why and how to mend it.
"""


class UserError(ValueError):
    """A mistake in the input, the options or the machine that the user can mend.

    The message is a single line: what is wrong, where (file, row, column), why, and the command or
    edit that fixes it.  ``cli.run`` prints it and exits with status 2; no traceback is shown.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
