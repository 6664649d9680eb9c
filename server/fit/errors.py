"""Why nothing can be fitted."""


class FitError(Exception):
    """The rows or the options cannot be used; the message is one sentence for the console."""
