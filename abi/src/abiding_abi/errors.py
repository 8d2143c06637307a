"""The one exception that the command line shows as one line."""


class UserError(Exception):
    """Something that the user can repair: a wrong path, option or file. Shown without a traceback."""
