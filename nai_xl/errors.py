"""Errors: one that a user reads, and how a function's own complaint about its arguments becomes one.

Functions below the command line raise ValueError and name their own parameters ("gamma=0: must be positive"). Whoever
knows the config key puts it before the message with `keyed` or `under` ("loss.gamma=0: must be positive").
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from nai_xl.redact import redacted


class UserError(Exception):
    """Bad input. Its message names the file or the override to change. Entry points print it without a traceback and
    exit with status 1.
    """


class EvaluatorFailed(UserError):
    """An evaluator has raised an error of its own. The weights of the step are sound, and it has not been reported."""


STOPPED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: not finished, and the same command goes on


class Stopped(KeyboardInterrupt):
    """A signal has ended the program in order: all that it had is saved. Entry points exit with STOPPED_STATUS.

    together: all ranks raise it at the same place, and can still wait for each other.
    """

    def __init__(self, *, together: bool = False):
        super().__init__()
        self.together = together


class ChoiceError(ValueError):
    """An object refuses one of the choices that it is built from.

    choice: the name of the parameter that holds the choice. reason: why, beginning with a parameter of the choice
    itself ("gamma=0: must be positive") where that is at fault. value: the choice in a word, if it has one.
    """

    def __init__(self, choice: str, reason: str, value: str = ""):
        self.choice, self.reason, self.value = choice, reason, value
        super().__init__(self.told(choice))

    def told(self, key: str) -> str:
        """The message with `key` as the name of the choice."""
        return f"{key}={self.value} {self.reason}" if self.value else under(key, self.reason)


def under(key: str, message: str) -> str:
    """`message`, about what config key `key` builds, with the key before it.

    under("loss", "gamma=0: ...") is "loss.gamma=0: ..."; a message that begins with no parameter becomes "loss: ...".
    """
    names_a_parameter = re.match(r"[a-z_][\w.]*(=|: )", message)
    return f"{key}.{message}" if names_a_parameter else f"{key}: {message}"


@contextmanager
def keyed(key: str) -> Iterator[None]:
    """A ValueError raised inside becomes a UserError whose message begins with the config key `key`."""
    try:
        yield
    except ValueError as error:
        raise UserError(under(key, one_line(error))) from error


LONGEST = 2000  # characters of a message; a compiler's can have hundreds of thousands


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks and secrets, or its name when it has none."""
    words = redacted(" ".join(str(error).split())) or type(error).__name__
    return words if len(words) <= LONGEST else f"{words[:LONGEST]} ..."


def with_kind(error: BaseException) -> str:
    """'no images in DIR' for what a user is meant to read, 'RuntimeError: ...' for the rest."""
    return one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
