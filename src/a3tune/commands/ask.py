"""`a3tune ask`: one question about one image, and a picture of where the model looked."""

import io
from pathlib import Path

from a3tune.commands.subject import Subject
from a3tune.config import RunConfig
from a3tune.evaluation.answer import ask as answer
from a3tune.machine.files import write_atomic
from a3tune.types import Sample


def ask(config: RunConfig, adapter: Path | None, image: Path, question: str, out: Path) -> str:
    """The answer to one question; `out` becomes a PNG of the image under the attention of the answer."""
    vlm = Subject(config, adapter).load()
    sample = Sample(id="question", image=image, prompt=question, answer="", answer_type="open")
    found = answer(vlm, sample, config.active_evaluation)
    picture = io.BytesIO()
    found.picture().save(picture, "PNG")
    write_atomic(out, picture.getvalue())
    return found.text
