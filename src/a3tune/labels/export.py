"""The labels of samples for other tools and for the eye: COCO JSON, and pictures with the segments drawn."""

import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from a3tune.data.images import load_image
from a3tune.errors import DataError, LabelError
from a3tune.labels.store import LabelStore, StoredImage
from a3tune.machine.files import all_or_none, write_atomic
from a3tune.masks import area, bounding_box, decode_mask
from a3tune.types import Labels, Sample

_GREEN, _RED = np.array([0, 200, 0]), (255, 0, 0)
_OPACITY = 0.4


@dataclass(slots=True)
class Exported:
    """What an export wrote."""

    images: int = 0
    """COCO: different images. Pictures: files, one per sample."""
    segments: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    """Sample id -> why it has no labels."""


def export_coco(
    store: LabelStore, samples: Iterable[Sample], out: Path, *, top_k: int | None = 4, threshold: float | None = None
) -> Exported:
    """Write the segments that guide the attention as one COCO file with compressed RLE masks.

    An image's `file_name` is the SHA-256 of its encoded bytes, because paths may name a patient. An annotation holds
    the `similarity` of the segment to the prompt and the sample's id as `question_id`; there is one category.

    Raises:
        OutputError: the file cannot be written.
    """
    images: dict[str, dict] = {}
    annotations: list[dict] = []
    done = Exported()
    for sample, labels, image in labelled(store, samples, top_k, threshold, done):
        size = {"height": image.height, "width": image.width}
        entry = images.setdefault(image.hash, {"id": len(images) + 1, "file_name": image.hash, **size})
        for segment, similarity in zip(labels.segments, labels.similarity, strict=True):
            x0, y0, x1, y1 = bounding_box(segment.mask)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": entry["id"],
                    "category_id": 1,
                    "segmentation": {"size": list(segment.mask.size), "counts": segment.mask.counts},
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": area(segment.mask),
                    "iscrowd": 0,
                    "similarity": similarity,
                    "question_id": sample.id,
                }
            )
    done.images, done.segments = len(images), len(annotations)
    content = {
        "images": list(images.values()),
        "annotations": annotations,
        "categories": [{"id": 1, "name": "segment"}],
    }
    write_atomic(out, json.dumps(content).encode())
    return done


def export_overlays(
    store: LabelStore, samples: Iterable[Sample], out: Path, *, top_k: int | None = 4, threshold: float | None = None
) -> Exported:
    """Write one PNG per sample into the folder `out`: its image, segments in green, their boxes in red (Figure 3).

    Raises:
        OutputError: a file cannot be written.
    """
    done = Exported()
    with all_or_none() as new:  # some of the pictures would be in the way of the same command
        new(out)
        for sample, labels, _ in labelled(store, samples, top_k, threshold, done):
            picture = drawn(load_image(sample.image), labels)
            done.images += 1
            done.segments += len(labels.segments)
            content = io.BytesIO()
            picture.save(content, "PNG")
            name = re.sub(r"[^\w.-]+", "_", sample.id)
            write_atomic(new(out / f"{done.images:05d}_{name[:80]}.png"), content.getvalue())
    return done


def labelled(
    store: LabelStore, samples: Iterable[Sample], top_k: int | None, threshold: float | None, done: Exported
) -> Iterator[tuple[Sample, Labels, StoredImage]]:
    """Samples with their labels; those without any are noted in `done.skipped`."""
    for sample in samples:
        try:
            yield sample, store.labels(sample, top_k, threshold), store.image(sample)
        except (LabelError, DataError) as error:
            done.skipped[sample.id] = str(error)


def drawn(image: Image.Image, labels: Labels) -> Image.Image:
    """The image with segments in green and their boxes in red."""
    pixels = np.asarray(image).astype(float)
    for segment in labels.segments:
        inside = decode_mask(segment.mask)
        pixels[inside] = (1 - _OPACITY) * pixels[inside] + _OPACITY * _GREEN
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    for segment in labels.segments:
        left, top, right, bottom = bounding_box(segment.mask)
        width = max(1, max(picture.size) // 200)
        ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), outline=_RED, width=width)
    return picture
