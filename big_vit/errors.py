"""The one exception whose message is meant for the user, and what the user may have meant."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can fix: the message names the key or file and the remedy.

    Commands print it as one line and exit with status 2; any other exception is
    a bug of ours and keeps its traceback.
    """

    status = 2

    def __str__(self) -> str:
        # What files and users named may hold codes that would control the terminal.
        return '\n'.join(map(printable, super().__str__().split('\n')))


class Unavailable(UserError):
    """What may pass by itself: another host, or a store in the network, does not answer.

    Commands exit with status 75 (EX_TEMPFAIL of sysexits.h), on which `launch/babysit` starts the
    same command again.
    """

    status = 75


# Errors of files that another attempt cannot cure.
PERMANENT_ERRORS = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)


def failure_at(place: object, error: BaseException) -> type[UserError]:
    """Choose the class of an error of reading or writing at a path or URL."""
    in_network = '://' in str(place) and not isinstance(error, PERMANENT_ERRORS)
    return Unavailable if in_network and 'Forbidden' not in str(error) else UserError


def printable(text: str) -> str:
    """Escape control characters, line breaks among them, and what else is not printed."""
    if text.isprintable():
        return text
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def nearest(word: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the name that a misspelt word comes closest to, whatever its case; None if none does.

    Args:
      cutoff: least similarity, from 0 to 1.
    """
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=cutoff)
    return folded[near[0]] if near else None
