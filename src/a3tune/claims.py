"""What the files of a model folder claim, against what they hold: told before a model or tokenizer is built of them.

A line of JSON can ask for a million layers or for a text that doubles forty times. Knows the fields of transformers'
and tokenizers' files; builds nothing.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from a3tune.errors import ModelError

MAX_LAYERS = 1024
"""Of one part of a model, and of the experts of one layer; published ones have up to some 130, and 512."""
MAX_SIDE = 2**14
"""Pixels of a side that images are scaled to."""
MAX_AREA = 10**8
"""Pixels, where a processor counts those of the whole image."""
MAX_JSON = 2**27
"""Bytes of one JSON file; the largest published tokenizers have about 35 million."""
MAX_HEADER = 2**25
"""Bytes of the list of tensors in one file; some 100 a tensor, and models have a few thousand."""
MAX_GROWTH = 64
"""Times that a tokenizer's rules may lengthen a text."""
_LARGEST = {
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": 1000,
    "num_key_value_heads": 1000,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "vocab_size": 10**7,
    "image_size": MAX_SIDE,
    "patch_size": 10**4,
    "image_token_id": 10**9,
    "image_token_index": 10**9,
}
"""Fields of a model's configuration -> far beyond any model that there is."""
_SLACK = 4
"""Parameters per byte of weights: 4-bit ones have two, and not all that a configuration names is counted here."""
_WEIGHTS = (".safetensors", ".bin")
_DEPTHS = ("layers", "depth", "depths", "experts", "n_layer", "num_blocks")
_WIDTHS = ("hidden_size", "embed_dim", "d_model", "n_embd")
_LENGTHS = ("intermediate_size", "vocab_size", "ffn_dim")


def check_claims(folder: Path) -> None:
    """Refuse a model folder whose files ask for far more than it holds.

    Raises:
        ModelError: naming the file and the field.
    """
    files = [path for path in folder.iterdir() if path.is_file()]
    for path in (path for path in files if path.suffix in (".json", ".jinja")):
        if path.stat().st_size > MAX_JSON:
            raise ModelError(f"{path}: expected at most {MAX_JSON:,} bytes, got {path.stat().st_size:,}")
    for path in (path for path in files if path.suffix == ".safetensors"):
        check_header(path)
    nbytes = sum(path.stat().st_size for path in files if path.suffix in _WEIGHTS)
    for place, part in _parts("config.json", _read(folder / "config.json")):
        _check_part(f"{folder / place}", part, nbytes)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        parts = list(_parts(name, _read(folder / name)))
        areas = any("merge_size" in part for _, part in parts)
        for place, part in parts:
            _check_scaling(f"{folder / place}", part, areas=areas)
    tokenizer = _read(folder / "tokenizer.json")
    growth = _growth(tokenizer)
    if growth > MAX_GROWTH:
        raise ModelError(
            f"{folder / 'tokenizer.json'}: its rules make a text up to {growth:.3g} times as long; expected at most "
            f"{MAX_GROWTH} times. Get the original tokenizer"
        )


def check_shape(name: str, config: Mapping[str, Any]) -> None:
    """The counts and sizes of a model's configuration, at any depth: what it is built from before its weights are seen.

    Raises:
        ModelError: one is no whole number, or none that a model can have.
    """
    for field, value in config.items():
        if isinstance(value, Mapping):
            check_shape(name, value)
        elif field in _LARGEST and value is not None:
            for number in value if isinstance(value, list | tuple) else [value]:
                if type(number) is not int or not 1 <= number <= _LARGEST[field]:
                    raise ModelError(
                        f"{name}: config.json: {field}: expected an integer from 1 to {_LARGEST[field]:,}, "
                        f"got {str(value)[:80]!r}; get the complete, original checkpoint"
                    )


def check_header(path: Path) -> None:
    """Refuse safetensors whose list of tensors is far larger than any model needs: it is read as a whole.

    Raises:
        ModelError: naming the file.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER:
        raise ModelError(f"{path}: expected a header of at most {MAX_HEADER:,} bytes, it claims {size:,}")


def _check_part(where: str, part: Mapping[str, Any], nbytes: int) -> None:
    depth, layered = 1, False
    for name, value in part.items():
        counts = value if isinstance(value, list) else [value]
        if name.endswith(_DEPTHS) and (claimed := max(map(_count, counts), default=0)):
            if claimed > MAX_LAYERS:
                raise ModelError(f"{where}: {name}: expected at most {MAX_LAYERS:,}, got {claimed:,}")
            depth, layered = max(depth, claimed), True
    width = max((_count(part.get(name)) for name in _WIDTHS), default=0)
    length = max((_count(part.get(name)) for name in _LENGTHS), default=0)
    sides = _count(part.get("image_size")) // max(1, _count(part.get("patch_size")))
    claimed = depth * width**2 + width * length + sides**2 * max(1, width)
    # Without layers of its own it only names what its parts have.
    if layered and nbytes and claimed > _SLACK * nbytes:
        raise ModelError(
            f"{where}: its widths and layers stand for at least {claimed:,} parameters; the weights beside it have "
            f"{nbytes:,} bytes. Get the complete, original checkpoint"
        )


def _check_scaling(where: str, part: Mapping[str, Any], *, areas: bool) -> None:
    """Sizes that images are brought to, and lengths of the text that stands for them; edges may be areas (Qwen-VL)."""
    for name, value in part.items():
        area = name in ("min_pixels", "max_pixels") or (areas and name in ("shortest_edge", "longest_edge"))
        limit = MAX_AREA if area else MAX_SIDE
        named = name.endswith(("size", "edge", "height", "width", "length", "patches", "pixels", "frames"))
        if named and _count(value) > limit:
            raise ModelError(f"{where}: {name}: expected at most {limit:,}, got {_count(value):,}")


def _parts(name: str, content: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A configuration and all configurations in it, each with its place; depth is bounded by what JSON reads."""
    if isinstance(content, dict):
        yield name, content
        for key, value in content.items():
            yield from _parts(f"{name}: {key:.60}", value)


def _growth(tokenizer: Mapping[str, Any]) -> float:
    """How many times as long a tokenizer's rules make a text at most.

    From the last rule to the first: what a letter becomes is what the letters that replace it become after that.
    """
    rules = [*_replacements(tokenizer.get("normalizer")), *_replacements(tokenizer.get("pre_tokenizer"))]
    grown: dict[str, float] = {}
    others = 1.0  # of letters that no rule names
    for old, content in reversed(rules):
        length = sum(grown.get(letter, others) for letter in content)
        if old is None:
            # An expression may match any letter, and the empty places between letters.
            others = max(others, 2 * length)
            grown = {letter: max(value, 2 * length) for letter, value in grown.items()}
        else:
            grown |= {letter: max(grown.get(letter, others), length / len(old)) for letter in old}
    return max([others, *grown.values()])


def _replacements(rules: Any) -> Iterator[tuple[str | None, str]]:
    """Texts and what takes their place, in order; None for an expression. Rules that only split or lower count not."""
    if isinstance(rules, list):
        for rule in rules:
            yield from _replacements(rule)
    elif isinstance(rules, dict):
        for key in ("normalizers", "pretokenizers"):
            yield from _replacements(rules.get(key))
        if rules.get("type") == "Replace" and isinstance(rules.get("content"), str):
            pattern = rules.get("pattern")
            old = pattern.get("String") if isinstance(pattern, dict) else None
            yield (old if isinstance(old, str) and old else None), rules["content"]


def _count(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty for a file that is not there or is none: whoever needs it says so."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
