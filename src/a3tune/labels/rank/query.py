"""What a ranker reads: the prompt, in a sentence that says what kind of image it is about. Knows samples, no model."""

from a3tune.errors import ConfigError, LabelError
from a3tune.types import Sample


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
