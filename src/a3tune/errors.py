"""One exception type per kind of user mistake. A traceback is for our bugs only: the CLI prints these without one."""

import reprlib

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


_LONGEST_WORD = 500
"""Letters; what is longer may be an image in base 64."""


class _Shown(reprlib.Repr):
    def repr_bytes(self, value: bytes, level: int) -> str:
        return f"<{len(value):,} bytes>"

    def repr_str(self, value: str, level: int) -> str:
        if is_data_uri(value):
            return f"<data URI of {len(value):,} characters>"
        encoded = len(value) > _LONGEST_WORD and len(value.split(maxsplit=1)[0]) > _LONGEST_WORD
        return f"<{len(value):,} characters>" if encoded else repr(value[: self.maxstring])


def shown(value: object, most: int = 60) -> str:
    """How a message quotes a value that came from outside: every message does it with this.

    At most `most` characters of its Python form. Of bytes and data URIs only their length: they may be a patient.
    """
    short = _Shown()
    short.maxstring = short.maxother = short.maxlong = most
    text = short.repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def is_data_uri(text: str) -> bool:
    """Whether a text holds a file (`data:image/png;base64,...`) instead of naming one."""
    return text[:5].lower() == "data:"
