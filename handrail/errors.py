"""The exceptions that a user is meant to read."""


class UserError(Exception):
    """Something the user gave cannot be used. The message is one sentence: what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class Paused(Exception):
    """The run should write a checkpoint and stop, to be resumed."""
