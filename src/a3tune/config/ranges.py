"""Types of settings: what each may be, for pydantic and in words."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field, PlainValidator

from a3tune.errors import ConfigError
from a3tune.types import Filling


def check_heads(value: Any) -> int | float | str:
    """A number of heads as `attention.heads.head_count` takes it; ValueError for what it does not.

    A percentage becomes a decimal number, so that one share has one form; 100% has no such form and stays. A whole
    number is a count and a decimal one a share, so 1.0 would be all heads where 1 is one: it is refused.
    """
    if isinstance(value, float) and value == 1:
        raise ValueError("1.0 could be one head or all of them: write 1 for one head, or 100% for all")
    percent = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)%", value) if isinstance(value, str) else None
    if percent and 0 < float(percent[1]) <= 100:
        return "100%" if float(percent[1]) == 100 else float(percent[1]) / 100
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, float) and 0 < value < 1:
        return value
    raise ValueError(
        "expected an integer >= 1, a percentage such as 12.5% (at most 100%), or a number > 0 and < 1, got "
        f"{json.dumps(value, default=str)[:80]}"
    )


def check_fillings(value: Any) -> tuple[str, ...]:
    """Names of fillings, each once, as a list or with commas between them; ValueError for anything else."""
    names = [name.strip() for name in value.strip("[]").split(",")] if isinstance(value, str) else value
    if isinstance(names, list | tuple) and names and all(name in get_args(Filling) for name in names):
        return tuple(dict.fromkeys(names))
    raise ValueError(
        f"expected one or more of {', '.join(get_args(Filling))} with commas between them, got "
        f"{json.dumps(value, default=str)[:80]}"
    )


def check_names(value: Any) -> tuple[str, ...]:
    """Names, each once, as a list or with commas between them; null and `none` are no names. ValueError for others."""
    names = [name.strip() for name in value.strip("[]").split(",")] if isinstance(value, str) else value
    if names in (None, ["none"], [""]):
        return ()
    if isinstance(names, list | tuple) and all(isinstance(name, str) and name for name in names):
        return tuple(dict.fromkeys(names))
    raise ValueError(f"expected names with commas between them, got {json.dumps(value, default=str)[:80]}")


def check_head_count(name: str, heads: int | float | str | None, total: int | None) -> None:
    """ConfigError for a setting that asks for more heads than a model has; None is not said, or not known."""
    if isinstance(heads, int) and total is not None and heads > total:
        raise ConfigError(f"{name}: expected at most {total}, the number of heads of this model, got {heads}")


Count = Annotated[int, Field(strict=True, ge=1, description="an integer >= 1")]
Natural = Annotated[int, Field(strict=True, ge=0, description="an integer >= 0")]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32, description="an integer >= 0 and < 2**32")]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False, description="a number > 0")]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False, description="a number >= 0")]
Share = Annotated[float, Field(strict=True, ge=0, le=1, description="a number >= 0 and <= 1")]
Fraction = Annotated[float, Field(strict=True, gt=0, le=1, description="a number > 0 and <= 1")]
Heads = Annotated[int | float | str, PlainValidator(check_heads)]
GivenHeads = Annotated[
    int | float | str | None, PlainValidator(lambda value: None if value is None else check_heads(value))
]
"""`Heads`, or null; not a union, of which every branch would complain."""
Fillings = Annotated[tuple[Filling, ...], PlainValidator(check_fillings)]
Names = Annotated[tuple[str, ...], PlainValidator(check_names)]
Cosine = Annotated[float, Field(strict=True, ge=-1, le=1, description="a number >= -1 and <= 1")]
Dropout = Annotated[float, Field(strict=True, ge=0, lt=1, description="a number >= 0 and < 1")]
Switch = Annotated[bool, Field(strict=True, description="true or false")]
Text = Annotated[str, Field(strict=True, min_length=1, description="text")]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N")]
FilePath = Annotated[Path, Field(description="a path")]
Options = Annotated[
    dict[str, bool | int | float | str], Field(description="settings such as {min_area: 0.001}: names and plain values")
]
