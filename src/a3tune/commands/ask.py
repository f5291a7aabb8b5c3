"""`a3tune ask`: one question about one image, and a picture of where the model looked."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np

from a3tune.commands.subject import Subject
from a3tune.config import RunConfig
from a3tune.data.images import load_image
from a3tune.evaluation.evaluate import evaluate
from a3tune.machine.files import write_atomic
from a3tune.types import Sample
from a3tune.vlm.grids import token_boxes
from a3tune.vlm.heat import overlay
from a3tune.vlm.patches import paint


def ask(config: RunConfig, adapter: Path | None, image: Path, question: str, out: Path) -> str:
    """The answer to one question; `out` becomes a PNG of the image under the attention of the answer."""
    vlm = Subject(config, adapter).load()
    sample = Sample(id="question", image=image, prompt=question, answer="", answer_type="report")
    results = evaluate(vlm, [sample], replace(config.active_evaluation, occlude=False))
    pixels = np.asarray(load_image(image))
    size = (pixels.shape[0], pixels.shape[1])
    heat = paint(results.maps[sample.id].astype(np.float32), token_boxes(vlm, *size), size)
    picture = io.BytesIO()
    overlay(pixels, heat).save(picture, "PNG")
    write_atomic(out, picture.getvalue())
    return results.predictions[0].prediction
