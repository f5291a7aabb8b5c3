"""What transformers takes from a model's JSON files as it stands, and stumbles over only when an image is asked about.

Knows fields of processors and of generation settings; not what they mean to a family.
"""

import math
from typing import Any

from a3tune.claims import MAX_SIDE
from a3tune.errors import ModelError

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FLAGS = ("do_sample", "use_cache", "output_attentions", "output_hidden_states", "output_scores")
_LARGEST = 10**9
"""Of what may count the pixels of an image, and ids of tokens."""


def check_generation(settings: Any, name: str) -> None:
    """Raise ModelError for a `generation_config.json` that no answer can be written with."""
    for field in _IDS:
        ids = getattr(settings, field, None)
        every = ids if isinstance(ids, list) else [ids]
        if not all(one is None or (type(one) is int and -1 <= one < _LARGEST) for one in every):
            raise _wrong(name, "generation_config.json", field, "ids of tokens", ids)
    for field in _FLAGS:
        _check_flag(name, "generation_config.json", field, getattr(settings, field, None))


def check_images(images: Any, name: str) -> None:
    """Raise ModelError for an image processor whose numbers are none, or none that an image can have."""
    file = "preprocessor_config.json or processor_config.json"
    for field in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad", "do_convert_rgb"):
        _check_flag(name, file, field, getattr(images, field, None))
    for field in ("image_mean", "image_std", "rescale_factor"):
        value = getattr(images, field, None)
        numbers = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if not all(_is_number(one) and (one > 0 or field == "image_mean") for one in numbers):
            raise _wrong(name, file, field, "numbers" if field == "image_mean" else "numbers above 0", value)
    for field in ("size", "crop_size"):
        sizes = getattr(images, field, None)
        for side, value in dict(sizes or {}).items():
            most = MAX_SIDE if side in ("height", "width") else _LARGEST
            if value is not None and (type(value) is not int or not 1 <= value <= most):
                raise _wrong(name, file, f"{field}: {side}", f"an integer from 1 to {most:,}", value)


def _check_flag(name: str, file: str, field: str, value: Any) -> None:
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, file, field, "true or false", value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(name: str, file: str, field: str, expected: str, value: Any) -> ModelError:
    return ModelError(
        f"{name}: {file}: {field}: expected {expected}, got {str(value)[:80]!r}; get the complete, original checkpoint"
    )
