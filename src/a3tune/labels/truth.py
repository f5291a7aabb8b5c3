"""A sample's own regions as labels."""

from a3tune.errors import LabelError
from a3tune.masks import encode_mask, region_mask
from a3tune.types import Labels, Sample, Segment


def truth_labels(sample: Sample, height: int, width: int) -> Labels | None:
    """A sample's own regions as labels, one segment each; None if nobody said where to look.

    Raises:
        LabelError: a region does not fit an image of this size.
    """
    if sample.regions is None:
        return None
    try:
        segments = tuple(Segment(encode_mask(region_mask(region, height, width))) for region in sample.regions)
    except LabelError as error:
        raise LabelError(f"sample {sample.id}: {error}") from error
    return Labels(sample.id, segments, (1.0,) * len(segments))
