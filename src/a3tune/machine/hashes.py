"""Names for values, by their content."""

import hashlib
import json


def json_hash(value: object) -> str:
    """SHA-256 of a JSON value, in hexadecimal; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def short_hash(value: object) -> str:
    """The first 16 digits of `json_hash`: short enough for the name of a file."""
    return json_hash(value)[:16]
