"""The one exception whose message is meant for the user."""


class UserError(Exception):
    """A mistake that the user can fix: the message names the key or file and the remedy.

    Commands print it as one line and exit with status 2; any other exception is
    a bug of ours and keeps its traceback.
    """
