"""The one exception that a person caused and a person can mend."""

from __future__ import annotations

_LONGEST = 1000


def _printable(text: object) -> str:
    """``text`` on one line, without control characters, shortened in the middle: its end says the mend."""
    said = str(text)
    if len(said) > 8 * _LONGEST:
        # What the other end of the wire called something may be as long as its message.
        said = f"{said[: 4 * _LONGEST]} {said[-4 * _LONGEST :]}"
    line = " ".join(said.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    return line


class UserError(Exception):
    """A mistake in what the user supplied. Its text is one line that names the thing and says the mend.

    The command line prints it without a traceback and exits with 2; a site sends it to the server as its answer.
    Names in it may come from the other end of the wire, so it never holds a line break or a control character, and
    is never long.
    """

    def __init__(self, text: str) -> None:
        super().__init__(_printable(text))


class PrivateError(UserError):
    """A mistake in a site's data. Its text may quote records, so it is shown at the site and never sent."""


class NonFiniteError(UserError):
    """A tensor holds NaN or infinity."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is a device, or this machine, that had no room left for a tensor."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def one_line(error: BaseException) -> str:
    """The text of ``error`` on one line, prefixed by its type when it is not a :class:`UserError`."""
    text = _printable(error)
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
