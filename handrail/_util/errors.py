"""The exceptions that a user is meant to read."""


class UserError(Exception):
    """Something the user gave cannot be used. The message is one sentence: what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class Paused(Exception):
    """The run should write a checkpoint and stop, to be resumed."""


class BadRow(Exception):
    """A row that cannot be used: in which field (if in one), what is wrong with it, and what to do.

    ``what`` holds nothing of the row itself, so rows that are bad in the same way have the same field and ``what``.
    """

    def __init__(self, field: str | None, what: str, advice: str) -> None:
        super().__init__(field, what, advice)
        self.field, self.what, self.advice = field, what, advice
