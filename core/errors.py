"""The one exception that a person caused and a person can mend."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user supplied. Its text is one line that names the thing and says the mend.

    The command line prints it without a traceback and exits with 2; a site sends it to the server as its answer.
    """


class NonFiniteError(UserError):
    """A tensor holds NaN or infinity."""


def one_line(error: BaseException) -> str:
    """The text of ``error`` on one line, prefixed by its type when it is not a :class:`UserError`."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
