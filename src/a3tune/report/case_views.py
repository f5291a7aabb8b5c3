"""The chosen cases with their pictures: image, true region, weak labels, and where each run looked.

Knows images and maps; which questions are shown is the business of `cases`, how they look that of `figures`.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from a3tune.config import RunConfig
from a3tune.data.images import load_image
from a3tune.labels.make import make_maker
from a3tune.masks import decode_mask, region_mask
from a3tune.metrics.catalogue import right
from a3tune.report.cases import Choice, Selection, select_cases
from a3tune.report.gather import EvaluatedRun
from a3tune.report.records import Case, Cases, View
from a3tune.types import Labels, Sample
from a3tune.vlm.load import load_boxes
from a3tune.vlm.patches import paint

TAGS = ("modality", "body", "question_type")
"""Fields of `meta` that stand beside a case."""
TokenBoxes = Callable[[int, int], np.ndarray]
"""height, width -> boxes of the image tokens (`vlm.grids.token_boxes`)."""


def make_cases(
    config: RunConfig, runs: Sequence[EvaluatedRun], samples: Sequence[Sample], shown: str, reference: str
) -> Cases:
    """Cases of the run `shown` beside `reference`. Weak labels are made now and kept nowhere: only training data has
    them."""
    titles = {run.name: run.title for run in runs}
    chosen = select_cases(
        {run.name: run.predictions for run in runs},
        method=shown,
        reference=reference,
        titles=(titles[shown], titles[reference]),
    )
    ids = {choice.id for choice in chosen.choices}
    labels = _weak_labels(config, [sample for sample in samples if sample.id in ids])
    return draw_cases(chosen, runs, samples, labels, load_boxes(config.model.path))


def draw_cases(
    chosen: Selection,
    runs: Sequence[EvaluatedRun],
    samples: Sequence[Sample],
    labels: Mapping[str, Labels],
    boxes: TokenBoxes,
) -> Cases:
    """The chosen cases; `labels` are weak labels by sample id, as far as there are any."""
    index_of = {sample.id: index for index, sample in enumerate(samples)}
    return Cases(
        chosen.rule,
        tuple(
            _case(samples[index_of[choice.id]], index_of[choice.id], choice, runs, labels, boxes)
            for choice in chosen.choices
        ),
    )


def _weak_labels(config: RunConfig, samples: Sequence[Sample]) -> dict[str, Labels]:
    settings = config.labels
    if settings.source != "weak":
        return {}
    maker = make_maker(settings, config.model.device)
    return {
        sample.id: maker.find(load_image(sample.image), sample).labels(sample.id, settings.top_k, settings.threshold)
        for sample in samples
    }


def _case(
    sample: Sample,
    index: int,
    choice: Choice,
    runs: Sequence[EvaluatedRun],
    labels: Mapping[str, Labels],
    boxes: TokenBoxes,
) -> Case:
    image = np.asarray(load_image(sample.image))
    size = (image.shape[0], image.shape[1])
    weak_labels = labels.get(sample.id)
    masks = [region_mask(region, *size) for region in sample.regions or ()]
    token_boxes = boxes(*size)
    views = [
        View(
            title=run.title,
            answer=run.predictions[index].prediction,
            right=right(run.predictions[index]),
            heat=paint(run.maps[sample.id].astype(np.float32), token_boxes, size),
            mass=run.predictions[index].attention.get("attention_mass", float("nan")),
        )
        for run in runs
    ]
    return Case(
        image=image,
        prompt=sample.prompt,
        answer=sample.answer,
        region=np.any(masks, axis=0) if masks else np.zeros(size, dtype=bool),
        labels=tuple(decode_mask(segment.mask) for segment in weak_labels.segments) if weak_labels else (),
        views=tuple(views),
        reason=choice.reason,
        tags=tuple(sample.meta[key] for key in TAGS if key in sample.meta),
    )
