"""The one exception that means "the input is wrong, not the program"."""


class InputError(ValueError):
    """Wrong input from a user: a path, an option, a file's content.

    The message is one or two sentences: what was expected, what came, how to cure it. The command line prints it
    alone, without a traceback, and exits with code 2.
    """
