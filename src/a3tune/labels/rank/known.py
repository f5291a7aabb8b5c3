"""What the shipped ranker knows: phantom scans, and nothing else. Knows images, no rows."""

from collections.abc import Iterable
from itertools import islice

from a3tune.data.images import load_image
from a3tune.data.phantom.scan import SIZE
from a3tune.errors import DataError
from a3tune.labels.rank.kinds import SHIPPED
from a3tune.labels.rank.visual import is_grey
from a3tune.types import ImageSource

_LOOKED_AT = 8
WARNING = (
    "warning: the shipped ranker knows phantom scans only, and these images are none: which regions it takes is near "
    "chance. Fetch real ones with `hf download facebook/sam-vit-base --local-dir sam` and `hf download "
    "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224 --local-dir biomedclip`, then label with "
    "labels.proposer=sam labels.weights=sam labels.ranker=biomedclip"
)


def warn_of(ranker: str, images: Iterable[ImageSource]) -> str:
    """`WARNING` if this is the shipped ranker and one of the first few images is no phantom scan, else ""."""
    if ranker != SHIPPED:
        return ""
    return "" if all(map(_may_be_phantom, islice(dict.fromkeys(images), _LOOKED_AT))) else WARNING


def _may_be_phantom(image: ImageSource) -> bool:
    """Whether it has the size of a scan, and is grey; an image that does not open is told elsewhere."""
    try:
        opened = load_image(image)
    except DataError:
        return True
    return opened.size == (SIZE, SIZE) and is_grey(opened)
