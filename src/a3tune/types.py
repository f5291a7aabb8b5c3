"""Frozen records that travel between rooms, and the legend of tensor-shape suffixes.

Shape legend, used as suffixes of tensor names (`map_BLHN`):

    B  samples in a batch         S  query positions of a forward pass      T  key positions (cache included)
    N  image tokens, padded       G  groups of text rows                    K  segments per sample, padded
    L  decoder layers             H  attention heads of a layer             R  selected heads
    O  experts                    D  hidden width                           E  embedding width of a ranker
    V  vocabulary
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

AnswerType = Literal["open", "closed", "choice", "report"]
Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the original image; x1 and y1 are exclusive."""
ImageSource = Path | bytes
"""Where an image comes from: a file, or the encoded bytes of one."""
Filling = Literal["mean", "blur", "noise"]
"""What stands in place of hidden pixels (`evaluation/occlusion.py`)."""
Part = Literal["inside", "outside", "elsewhere"]
"""What of an image is hidden: its region, all but its region, or as much of it somewhere else."""


@dataclass(frozen=True, slots=True)
class Rle:
    """A binary mask in COCO's compressed run-length encoding."""

    size: tuple[int, int]
    """Height and width in pixels."""
    counts: str


@dataclass(frozen=True, slots=True)
class Region:
    """A region of interest given by a user or a data set: a mask or a box, never both."""

    mask: Rle | None = None
    box: Box | None = None
    name: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one image."""

    id: str
    image: ImageSource
    prompt: str
    answer: str
    answer_type: AnswerType
    regions: tuple[Region, ...] | None = None
    """None: nobody said where to look. Empty: the question asks about no particular place."""
    meta: Mapping[str, str] = field(default_factory=dict)
    """Modality, organ, question type, patient: whatever results are broken down by."""
    options: tuple[str, ...] = ()
    """The answers to choose from, of a "choice" whose options are known."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A candidate region that a proposer found in an image (S* in section 4.1)."""

    mask: Rle
    score: float = 1.0
    """The proposer's own quality estimate in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Labels:
    """The segments that guide the attention for one sample (S in Eq. 3), best first."""

    sample_id: str
    segments: tuple[Segment, ...]
    similarity: tuple[float, ...]
    """Cosine similarity of each segment to the prompt; 1.0 for ground truth."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model answered to one sample."""

    id: str
    prompt: str
    answer: str
    answer_type: AnswerType
    prediction: str
    meta: Mapping[str, str] = field(default_factory=dict)
    attention: Mapping[str, float] = field(default_factory=dict)
    """Attention metrics of this sample, when its true regions are known."""
    report: Mapping[str, float] = field(default_factory=dict)
    """Metrics of this answer as a radiology report (`metrics.radiology`), when it is one."""
    reliance: Mapping[str, float] = field(default_factory=dict)
    """What this answer rests on (`metrics.reliance`), when it was asked again with parts of the image hidden."""
    options: tuple[str, ...] = ()
    """Of the sample."""
