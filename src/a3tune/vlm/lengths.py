"""How many tokens samples take in a model. Reads no weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from a3tune.data.images import load_image
from a3tune.errors import DataError
from a3tune.types import Sample
from a3tune.vlm.encode import prepare
from a3tune.vlm.load import load_bare


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of samples as they are trained on: image, prompt, answer and all that the template writes."""

    limit: int
    """Tokens that the model takes."""
    fitting: tuple[int, ...]
    """Tokens of the samples that it takes, in rising order."""
    problems: tuple[str, ...]
    """A line for each of the others: too long, a control token in its text, an image that the processor refuses."""


def token_lengths(path: str, samples: Sequence[Sample], progress: Callable[[int, int], None]) -> Lengths:
    """Encode every sample with the processor of the model at `path` (as `load_vlm` takes it).

    Raises what `load_vlm` raises of its configuration and processor.
    """
    vlm = load_bare(path)
    fitting: list[int] = []
    problems: list[str] = []
    for done, sample in enumerate(samples, start=1):
        try:
            fitting.append(len(prepare(vlm, [load_image(sample.image)], sample.prompt, sample.answer).input_ids))
        except DataError as error:
            problems.append(f"sample {sample.id:.60}: {error}")
        progress(done, len(samples))
    return Lengths(vlm.model.config.text_config.max_position_embeddings, tuple(sorted(fitting)), tuple(problems))
