"""One exception type per kind of user mistake. A traceback is for our bugs only: the CLI prints these without one."""

_SHOWN = 200
"""Characters of another library's message: it may quote a whole file."""


def in_short(error: object) -> str:
    """What another library says, in one line of ours."""
    return " ".join(str(error).split())[:_SHOWN]


class A3TuneError(Exception):
    """Base of every error that a user can mend. Its message says what, what was expected, what came, what to do."""


class ConfigError(A3TuneError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(A3TuneError):
    """A data file, a row of it, or an image cannot be used."""


class LabelError(A3TuneError):
    """Region labels cannot be made, read or matched to their samples."""


class ModelError(A3TuneError):
    """A model, processor or checkpoint cannot be used as asked."""


class AdapterError(A3TuneError):
    """An adapter does not fit its base model, or cannot do what was asked of it."""


class OutputError(A3TuneError):
    """A file cannot be written; what was there before still is."""


class RunError(A3TuneError):
    """A run folder is not ours, is in use, or does not hold what the command needs."""
