"""Exceptions whose messages are written for the user."""


class UserError(Exception):
    """The user's input cannot be used. The message is one sentence: what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class OutOfMemory(UserError):
    """Memory ran out. The message names the settings to lower."""


class Paused(Exception):
    """The run must write a checkpoint and stop; it can be resumed later."""


class BadRow(Exception):
    """A row cannot be used: the field at fault (None for the whole row), what is wrong, and what to do.

    ``what`` quotes nothing from the row, so rows with the same mistake have the same ``field`` and ``what``
    and can be counted together.
    """

    def __init__(self, field: str | None, what: str, advice: str) -> None:
        super().__init__(field, what, advice)
        self.field, self.what, self.advice = field, what, advice
