"""The one exception whose message is meant for the user."""


class UserError(Exception):
    """A mistake that the user can fix: the message names the key or file and the remedy.

    Commands print it as one line and exit with status 2; any other exception is
    a bug of ours and keeps its traceback.
    """


def printable(text: str) -> str:
    """Escape what a terminal would act on, in text that files or other hosts chose."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
