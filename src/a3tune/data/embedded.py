"""A file that a text holds in base 64 -> its bytes. Nothing is fetched."""

from base64 import b64decode

from a3tune.errors import DataError, is_data_uri, shown


def embedded_file(text: str) -> bytes:
    """Of a data URI (`data:image/png;base64,...`) or of bare base 64; white space in it counts for nothing.

    Raises:
        DataError: it is neither.
    """
    head, comma, encoded = text.partition(",") if is_data_uri(text) else (";base64", ",", text)
    try:
        if not comma or not head.rstrip().lower().endswith(";base64"):
            raise ValueError
        return b64decode("".join(encoded.split()), validate=True)
    except ValueError:  # of letters beyond ASCII too
        raise DataError(f"expected an image in base 64, got {shown(text)}") from None
