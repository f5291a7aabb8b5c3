"""The body of a chat completion -> a question for a model. Knows OpenAI's form; no HTTP.

What would change an answer and is not known here is refused, not ignored.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from a3tune.config import EvaluationConfig
from a3tune.data.embedded import embedded_file
from a3tune.decoding import Strategy, check_decoder, make_decoder, make_strategy
from a3tune.errors import ConfigError, DataError, ModelError, is_data_uri, shown
from a3tune.masks import box_of
from a3tune.serve.refusal import Refusal
from a3tune.types import Box, Region, Sample
from a3tune.vlm.load import Vlm

MOST_TOKENS = 4096
"""Longest answer that may be asked for."""
SAMPLING = ("beam", "nucleus", "sampling")
"""Methods that are a way to choose tokens: a temperature would be another one."""
_COLDEST = 1e-4
"""Below this temperature the likeliest token is taken: scores that are divided by less would leave float32."""
_STOPS = 4
_STOP_LETTERS = 200
_FORM = 'one message {"role": "user", "content": [{"type": "image_url", ...}, {"type": "text", ...}]}'


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Address(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None
    """Images are always taken as the model takes them."""


class _Part(_Strict):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: _Address | None = None


class _Message(_Strict):
    role: str
    content: str | list[_Part]
    name: str | None = None


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


Zero = Annotated[float, Field(ge=0, le=0)]


class _Body(_Strict):
    model: str
    messages: list[_Message]
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    decode: str | None = None
    decoding: dict[str, Any] = {}
    attention: bool = False
    region: Annotated[list[float], Field(min_length=4, max_length=4)] | None = None
    # One answer without probabilities, tools or penalties is what there is: these may say so.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    store: Literal[False] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    # These change no answer.
    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    service_tier: Any = None


@dataclass(frozen=True)
class Question:
    """What is asked of which model, and how it is to answer."""

    model: str
    sample: Sample = field(repr=False)
    decode: str
    """A name in `decoding.DECODERS`; `decoding` are its settings."""
    decoding: Mapping[str, Any]
    strategy: Strategy | None
    """In place of the method's own way to choose a token."""
    max_new_tokens: int
    seed: int | None
    stops: tuple[str, ...]
    stream: bool
    usage: bool
    """Whether a stream ends with what it took."""
    attention: bool

    def kind(self) -> str:
        """Questions of one kind may be answered together: the same model and settings; with a seed only alone, since
        random numbers are those of a batch."""
        alone = self.sample.id if self.seed is not None and self._random() else ""
        settings = (self.model, self.decode, self.decoding, repr(self.strategy), self.max_new_tokens, alone)
        return json.dumps(settings, sort_keys=True)

    def _random(self) -> bool:
        samples = self.strategy is not None and self.strategy.do_sample
        return samples or self.decode not in ("greedy", "beam", "dola", "opera")


def read_question(
    body: bytes, name: str, models: Mapping[str, Vlm], settings: Mapping[str, EvaluationConfig]
) -> Question:
    """The question in the body of a request.

    Args:
        name: what the question is called.
        models: what may be asked; `settings`: how each of them answers when nothing is said.

    Raises Refusal: 400, which names the field; 404 for a model that is not there.
    """
    asked = _validated(body)
    if asked.model not in models:
        raise Refusal(
            404,
            f"model {shown(asked.model)}: expected one of {', '.join(models)}",
            param="model",
            code="model_not_found",
        )
    prompt, image = _content(asked.messages)
    region = None if asked.region is None else (Region(box=_box(asked.region)),)
    usual = settings[asked.model]
    decode = asked.decode or usual.decode
    decoding = asked.decoding or (usual.decoding if decode == usual.decode else {})
    strategy = _strategy(asked) or (make_strategy(usual.strategy) if usual.strategy else None)
    try:
        decoder = make_decoder(decode, decoding)
        check_decoder(decoder, models[asked.model], regions_known=region is not None, strategy=strategy)
    except (ConfigError, ModelError) as error:
        param = "decode" if str(error).startswith("decode:") else "decoding"
        raise Refusal(400, str(error), param=param) from None
    return Question(
        model=asked.model,
        sample=Sample(name, image, prompt, "", "open", regions=region),
        decode=decode,
        decoding=decoding,
        strategy=strategy,
        max_new_tokens=asked.max_completion_tokens or asked.max_tokens or usual.max_new_tokens,
        seed=None if asked.seed is None else asked.seed % 2**32,
        stops=_stops(asked.stop),
        stream=asked.stream,
        usage=asked.stream_options is not None and asked.stream_options.include_usage,
        attention=asked.attention,
    )


def _validated(body: bytes) -> _Body:
    try:
        return _Body.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in problem["loc"] if part not in ("str", "list[_Part]"))
        if problem["type"] == "extra_forbidden":
            raise Refusal(400, f"{where}: is not supported here; leave it out", param=where) from None
        said = f"{where}: {problem['msg']}" + (f", got {shown(problem['input'])}" if where else "")
        raise Refusal(400, said, param=where or None) from None


def _content(messages: list[_Message]) -> tuple[str, bytes]:
    """The text and the image of the one turn that the models were trained on."""
    roles = [message.role for message in messages]
    if roles != ["user"]:
        raise Refusal(
            400,
            f"messages: expected {_FORM}, got the roles {shown(roles)}: the models answer one question about one "
            "image, without a system message and earlier turns",
            param="messages",
        )
    content = messages[0].content
    parts = [_Part(type="text", text=content)] if isinstance(content, str) else content
    where = "messages.0.content"
    texts, images = [], []
    for index, part in enumerate(parts):
        value = part.text if part.type == "text" else part.image_url
        if value is None:
            raise Refusal(400, f"{where}.{index}: expected the field {part.type}, it is missing", param=where)
        if isinstance(value, str):
            texts.append(value)
        else:
            images.append(_embedded(value.url, f"{where}.{index}.image_url.url"))
    if len(images) != 1:
        raise Refusal(400, f"{where}: expected one image, as {_FORM}, got {len(images)}", param=where)
    prompt = "\n".join(texts)
    if not prompt.strip():
        raise Refusal(400, f"{where}: expected a text that is not empty", param=where)
    return prompt, images[0]


def _embedded(url: str, where: str) -> bytes:
    """The image in a data URI."""
    if not is_data_uri(url):
        told = f"{where}: expected data:image/png;base64,..., addresses are not fetched, got {shown(url)}"
        raise Refusal(400, told, param=where)
    try:
        return embedded_file(url)
    except DataError as error:
        raise Refusal(400, f"{where}: {error}", param=where) from None


def _box(values: list[float]) -> Box:
    try:
        return box_of(values)
    except ValueError as error:
        raise Refusal(400, f"region: {error}; got {shown(values)}", param="region") from None


def _strategy(asked: _Body) -> Strategy | None:
    """How a temperature or top_p asks for a token to be chosen; None leaves it to the method."""
    if asked.temperature is None and asked.top_p is None:
        return None
    if asked.decode in SAMPLING:
        param = "temperature" if asked.temperature is not None else "top_p"
        raise Refusal(
            400, f"{param}: decode {asked.decode!r} is a way to choose tokens by itself; say one", param=param
        )
    if asked.temperature is not None and asked.temperature < _COLDEST:
        return Strategy()
    return Strategy(do_sample=True, temperature=asked.temperature or 1.0, top_k=0, top_p=asked.top_p or 1.0)


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else stop or []
    if len(texts) > _STOPS or not all(0 < len(text) <= _STOP_LETTERS for text in texts):
        raise Refusal(
            400,
            f"stop: expected at most {_STOPS} texts of 1 to {_STOP_LETTERS} letters, got {shown(stop)}",
            param="stop",
        )
    return tuple(texts)
