"""The one exception that a user is meant to read: a single message that names the file or the override to change."""


class UserError(Exception):
    """Bad input. Entry points print its message without a traceback and exit with status 1."""


LONGEST = 2000  # characters of a message; a compiler's can have hundreds of thousands


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks, or its name when it has none."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= LONGEST else f"{words[:LONGEST]} ..."


def with_kind(error: BaseException) -> str:
    """'no images in DIR' for what a user is meant to read, 'RuntimeError: ...' for the rest."""
    return one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
