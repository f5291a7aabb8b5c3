"""Types of settings: what each may be, for pydantic and in words."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(strict=True, ge=1, description="an integer >= 1")]
Natural = Annotated[int, Field(strict=True, ge=0, description="an integer >= 0")]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32, description="an integer >= 0 and < 2**32")]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False, description="a number > 0")]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False, description="a number >= 0")]
Share = Annotated[float, Field(strict=True, ge=0, le=1, description="a number >= 0 and <= 1")]
Fraction = Annotated[float, Field(strict=True, gt=0, le=1, description="a number > 0 and <= 1")]
Cosine = Annotated[float, Field(strict=True, ge=-1, le=1, description="a number >= -1 and <= 1")]
Dropout = Annotated[float, Field(strict=True, ge=0, lt=1, description="a number >= 0 and < 1")]
Switch = Annotated[bool, Field(strict=True, description="true or false")]
Text = Annotated[str, Field(strict=True, min_length=1, description="text")]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N")]
FilePath = Annotated[Path, Field(description="a path")]
Options = Annotated[
    dict[str, bool | int | float | str], Field(description="settings such as {min_area: 0.001}: names and plain values")
]
