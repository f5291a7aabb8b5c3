"""Conversations of chat and LLaVA data -> questions with their answers. Knows no images."""

from collections.abc import Iterable
from typing import Any

from a3tune.errors import DataError, shown

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}
_ROLES |= {"system": "system"}
_MARKS = ("<image>", "<|image|>", "<image_placeholder>")


def question_and_answers(value: Any) -> list[tuple[str, str]]:
    """The turns of `[{"from": "human", "value": ...}, ...]` or `[{"role": "user", "content": ...}, ...]`.

    What a system says is left out. Marks of images are taken out of questions.

    Raises:
        DataError: it is no conversation of questions that are answered in turn.
    """
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise DataError(f"expected a conversation, a list of messages, got {shown(value)}")
    said = [(_role(item), _content(item.get("content", item.get("value")))) for item in value]
    said = [(role, text) for role, text in said if role != "system"]
    roles = [role for role, _ in said]
    if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(f"expected questions and answers in turn, got {shown(roles)}")
    return [(without_marks(said[at][1]), said[at + 1][1].strip()) for at in range(0, len(said), 2)]


def without_marks(text: str) -> str:
    """A question without the marks that say where its image goes."""
    for mark in _MARKS:
        text = text.replace(mark, "")
    return text.strip()


def images_of(value: Iterable[Any]) -> list[Any]:
    """The images that parts of messages hold: `{"type": "image", "image": ...}` or `{"type": "image_url", ...}`."""
    found: list[Any] = []
    for message in value:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
                item = part.get("image") or part.get("path") or part.get("url") or part.get("image_url")
                item = item.get("url") if isinstance(item, dict) and "url" in item else item
                found += [item] if item else []
    return found


def _role(message: dict[str, Any]) -> str:
    name = message.get("role", message.get("from"))
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"expected messages of {', '.join(_ROLES)}, got {shown(name)}")
    return role


def _content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        texts = [part.get("text") for part in value if part.get("type") == "text"]
        if all(isinstance(text, str) for text in texts):
            return "\n".join(str(text) for text in texts)
    raise DataError(f"expected a text or a list of parts as a message, got {shown(value)}")
