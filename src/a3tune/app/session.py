"""What one visitor has on the page."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from a3tune.app.model import Answer, Heads
from a3tune.app.regions import ChosenRegion, Picks

if TYPE_CHECKING:
    from a3tune.app.hidden import Hidden

LARGEST = 640
"""Longest side, in pixels, at which an image is shown; models and segmenters get all of it."""


@dataclass(eq=False)
class Session:
    """An image and what was done with it. Another image is another session.

    Steps change it in place: a slow answer and a quick click at the same time do not undo each other.
    """

    image: Image.Image
    """RGB, in its own size."""
    title: str = ""
    """Of a synthetic scan; empty for a visitor's image, whose file name is nobody's business."""
    answers: dict[int, Answer] = field(default_factory=dict)
    """By pane of the page."""
    question: str = ""
    """Last chosen or asked."""
    heads: Heads = "selected"
    """Whose attention is shown."""
    region: ChosenRegion | None = None
    picks: Picks | None = None
    hidden: "dict[int, list[Hidden]]" = field(default_factory=dict)
    """By pane: what was said with parts of the image hidden, of the region as it is."""
    closed: bool = False
    """The visitor has gone on to another image: what is still on its way is not wanted any more."""
    turn: int = 0
    """How often was asked: only the last one is still to be answered."""
    key: str = ""
    """By which a tab that is loaded again is known (`visitors`)."""

    def set_region(self, region: ChosenRegion | None) -> None:
        self.region = region
        self.hidden.clear()

    def region_of(self, question: str) -> ChosenRegion | None:
        """The region, unless it is that of another question."""
        return self.region if self.region is not None and self.region.answers(question) else None

    def waits_for(self, turn: int) -> bool:
        """Whether what was asked then is still wanted."""
        return not self.closed and turn == self.turn

    def copied(self, key: str) -> "Session":
        """The same for another tab; what is done there stays there."""
        hidden = {pane: list(said) for pane, said in self.hidden.items()}
        return replace(self, answers=dict(self.answers), hidden=hidden, key=key)

    @property
    def scale(self) -> float:
        """Pixels on the page per pixel of the image; never more than 1."""
        return min(1.0, LARGEST / max(self.image.size))

    @property
    def shown_size(self) -> tuple[int, int]:
        """Height and width of the shown image."""
        width, height = self.image.size
        return max(1, round(height * self.scale)), max(1, round(width * self.scale))

    def shown(self, image: Image.Image | None = None) -> NDArray[np.uint8]:
        """uint8 `[h, w, 3]`: the image, or another of its size, as it is shown."""
        image, (height, width) = image or self.image, self.shown_size
        return np.asarray(image if self.scale == 1 else image.resize((width, height), Image.Resampling.BOX))

    def shown_mask(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """bool `[h, w]` of a mask of the image, as it is shown."""
        height, width = self.shown_size
        return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
