"""Answers in OpenAI's form, with the attention as an extension. Knows no HTTP and no model."""

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

from a3tune.evaluation.answer import Answer
from a3tune.serve.request import Question
from a3tune.serve.worker import Answered
from a3tune.types import Region

DONE = b"data: [DONE]\n\n"
_DIGITS = 6
"""Significant ones of an attention value."""


def completion(question: Question, created: int, answered: Answered) -> dict[str, Any]:
    """The whole answer."""
    message = {"role": "assistant", "content": answered.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answered.finish}
    reply = _head(question, created, "chat.completion") | {"choices": [choice], "usage": _usage(answered)}
    return reply | _attention(question, answered)


def begin(question: Question, created: int) -> bytes:
    """The first event of a stream."""
    return _event(_chunk(question, created, {"role": "assistant", "content": ""}))


def more(question: Question, created: int, text: str) -> bytes:
    """More of the text."""
    return _event(_chunk(question, created, {"content": text}))


def end(question: Question, created: int, answered: Answered) -> Iterator[bytes]:
    """The last events; the attention comes with the reason of the end."""
    yield _event(_chunk(question, created, {}, answered.finish) | _attention(question, answered))
    if question.usage:
        yield _event(_head(question, created, "chat.completion.chunk") | {"choices": [], "usage": _usage(answered)})
    yield DONE


def failed(body: dict[str, Any]) -> bytes:
    """An error amid a stream."""
    return _event(body)


def _head(question: Question, created: int, kind: str) -> dict[str, Any]:
    return {"id": question.sample.id, "object": kind, "created": created, "model": question.model}


def _chunk(question: Question, created: int, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return _head(question, created, "chat.completion.chunk") | {"choices": [choice]}


def _usage(answered: Answered) -> dict[str, int]:
    prompt, answer = answered.prompt_tokens, answered.answer_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _attention(question: Question, answered: Answered) -> dict[str, Any]:
    """The map as a picture and as values of patches; scores where the request has a region."""
    if answered.attention is None:
        return {}
    found: Answer = answered.attention
    file = io.BytesIO()
    found.picture().save(file, "PNG")
    regions = question.sample.regions
    region: Region | None = regions[0] if regions else None
    return {
        "attention": {
            "image": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
            "width": found.image.width,
            "height": found.image.height,
            "tokens": list(found.tokens),
            "values": [float(f"{value:.{_DIGITS}g}") for value in found.values],
            "boxes": [[round(side, 2) for side in box] for box in found.boxes.tolist()],
            "scores": None if region is None else found.scores(region),
        }
    }


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"
