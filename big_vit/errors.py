"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can fix: the message names the key or file and says how.

    Commands print it as one line and exit with status 2; any other exception is
    a bug of ours and keeps its traceback.
    """
