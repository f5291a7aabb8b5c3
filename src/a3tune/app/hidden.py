"""The same question about the image with parts of it hidden. Knows sessions and models; no page."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from a3tune.app.model import Answer, Asker
from a3tune.app.session import Session
from a3tune.evaluation.occlusion import hidden_parts, occlude
from a3tune.metrics.vqa import normalise
from a3tune.types import Filling, Part

TITLES: dict[Part, str] = {
    "inside": "Region hidden",
    "elsewhere": "As much hidden elsewhere",
    "outside": "All but the region hidden",
}


@dataclass(frozen=True, eq=False)
class Hidden:
    """What a model said with a part of the image hidden."""

    part: Part
    filling: Filling
    text: str
    changed: bool
    """Whether that is another answer than to the whole image; case, articles and punctuation do not count."""
    picture: NDArray[np.uint8]
    """uint8 `[h, w, 3]`: the image as it was asked about, as it is shown."""


def ask_hidden(asker: Asker, session: Session, answer: Answer, filling: Filling) -> Iterator[Hidden]:
    """The question of an answer once for each part in `TITLES` that its region in the session leaves.

    Raises what `Asker.ask` raises.
    """
    region, settings = session.region_of(answer.question), asker.settings
    if region is None or not region.mask.any():
        return
    parts = hidden_parts(session.image, region.mask, settings.dilation)
    for part in TITLES:
        if part not in parts:
            continue
        image = occlude(session.image, parts[part], filling, settings.seed)
        *_, said = asker.ask(answer.model, answer.method, image, answer.question, region)
        assert isinstance(said, Answer)
        changed = normalise(said.text) != normalise(answer.text)
        yield Hidden(part, filling, said.text, changed, session.shown(image))
