"""The error of `fit`."""


class FitError(Exception):
    """The rows or the options cannot be used; the message is one sentence for the console."""
