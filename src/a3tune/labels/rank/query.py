"""What a ranker reads: the prompt, in a sentence that says what kind of image it is about. Knows samples, no model."""

from a3tune.errors import ConfigError, LabelError
from a3tune.types import Sample

PUBLISHED_QUERY = "Medical image of {location}. {question}"
"""The published code's; `location` is SLAKE's name for the organ."""

QUERIES: dict[str, str] = {
    "slake": "Medical image of {organ}. {question}",
    "vqa_rad": "Medical image of {organ}. {question}",
    "path_vqa": "Pathology image. {question}",
    "iu_xray": "Chest X-ray. {question}",
    "mimic_cxr": "Chest X-ray. {question}",
    "omnimedvqa": "{modality} image. {question}",
}
"""Data set -> the published query with what that data set knows of its images."""


def format_query(template: str, sample: Sample) -> str:
    """Text to rank by: `{question}` becomes the sample's prompt, any other `{field}` its `meta[field]`.

    Raises:
        LabelError: the sample has no such field.
        ConfigError: the template is malformed.
    """
    try:
        return template.format_map({**sample.meta, "question": sample.prompt})
    except KeyError as error:
        known = ", ".join(["question", *sample.meta])
        raise LabelError(
            f"sample {sample.id}: the query {template!r} needs the meta field {error}, the sample has {known}"
        ) from None
    except (ValueError, IndexError, AttributeError) as error:
        raise ConfigError(f"query {template!r}: expected text with {{question}} and {{fields}}: {error}") from None
