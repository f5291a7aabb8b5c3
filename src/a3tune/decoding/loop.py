"""transformers' own decoding loops with other scores: the one `custom_generate` callable, and the second branch.

Knows caches, beams and forward keywords; not how a method makes its scores.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)

from a3tune.compat.generation import (
    CACHE,
    CARRIED,
    ENCODED,
    after_pass,
    decoding_loop,
    first_pass,
    first_positions,
    next_pass,
    reading_prompt,
    repeated,
)
from a3tune.decoding.base import Inputs
from a3tune.decoding.branches import encode_images
from a3tune.decoding.watching import watched
from a3tune.vlm.load import Vlm

NEVER = -1e4
"""Score of a token that no answer may hold (`strategy.placeholders`); finite, since methods calculate with it."""


class Scorer(Protocol):
    """Makes a method's scores of the next token out of the model's; called once per step, before most processors."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """int64 `[B, S]`, prompt and answer so far, and fp32 `[B, V]` -> `[B, V]`. With beams, B counts beams.

        `scores` are logits, with beams their log-softmax; what comes back is read the same way. Tokens that no answer
        may hold are at `NEVER`.
        """
        ...

    def reorder(self, beam_B: Tensor) -> None:
        """Beams are reordered after each step: row b goes on from what was row `beam_B[b]`."""
        ...


def run(
    vlm: Vlm,
    inputs: Inputs,
    config: GenerationConfig,
    generator: torch.Generator | None = None,
    *,
    scorer: Scorer | None = None,
    forward: Mapping[str, Any] | None = None,
) -> Tensor:
    """Answer a batch with transformers' loop for `config` (greedy, sampling or beams).

    Args:
        inputs: as `Decoder.__call__` takes them; `mm_encoder_outputs` may stand in for the pixels.
        generator: see `Decoder.__call__`.
        scorer: what to make of the model's scores; None takes them as they are.
        forward: keywords for every forward pass of the model (not of a scorer's branches). The passes after the prompt
            have one row per beam, that of the prompt one per sample.

    Returns the new tokens, int64 `[B, S_new]`, padded on the right.
    """
    beams = config.num_beams or 1
    prompt = encode_images(vlm, inputs) if beams > 1 else inputs
    inputs = dict(prompt)
    if ENCODED in inputs:
        # generate() repeats the features of beams in the object it is given.
        inputs[ENCODED] = {kind: copy.copy(out) for kind, out in inputs[ENCODED].items()}

    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        processors = list(logits_processor) if scorer is None else [never, scorer, *logits_processor]
        cache = model_kwargs[CACHE]
        branch = Branch(vlm, prompt, beams, cache) if beams > 1 else None
        with _followed(cache, scorer), _read_once(model, branch, forward or {}):
            return decoding_loop(model, beams)(
                input_ids,
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **model_kwargs,
                **(forward or {}),
            )

    suppressed = torch.tensor(config.suppress_tokens, device=inputs["input_ids"].device)

    def never(input_ids: Tensor, scores: Tensor) -> Tensor:
        # Before the scorer as well: a cut relative to such a token would leave none that an answer may hold.
        return scores.index_fill(-1, suppressed.to(scores.device), NEVER)

    model: Any = vlm.model
    length = inputs["input_ids"].shape[1]
    with seeded(generator), _stops(vlm) as stops:
        stops.extend(watched(length) if beams == 1 else [])
        sequences = model.generate(**inputs, generation_config=config, stopping_criteria=stops, custom_generate=loop)
    return sequences[:, length:]


class Branch:
    """A second reading of a batch by the same model: inputs and KV cache of its own, tokens chosen elsewhere."""

    def __init__(self, vlm: Vlm, inputs: Inputs, beams: int = 1, cache: Any = None) -> None:
        """`inputs` as `run` takes them; after the prompt every sample becomes `beams` rows. `cache` is an empty one."""
        self.model: Any = vlm.model
        self.beams = beams
        self.input_ids: Tensor = inputs["input_ids"]
        self.cache: Any = cache
        if cache is None:
            self.cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        positions = first_positions(self.model, inputs)
        self._carried: dict[str, Any] = {name: value for name, value in inputs.items() if name != "input_ids"}
        self._carried |= {"position_ids": positions, CACHE: self.cache, "use_cache": True}

    def prefill(self, **forward: Any) -> Any:
        """Read the prompt; `logits` `[B, 1, V]`, not yet one row per beam. `forward` are further forward keywords."""
        outputs = self._pass(first_pass, forward)
        self._carried = {name: self._carried[name] for name in CARRIED if name in self._carried}
        self.input_ids, self._carried = repeated(self.model, self.beams, self.input_ids, self._carried)
        if self.beams > 1:
            self.cache.batch_repeat_interleave(self.beams)
        return outputs

    def step(self, tokens_B: Tensor, **forward: Any) -> Any:
        """Read one more token per row; `logits` `[B, 1, V]`."""
        self.input_ids = torch.cat([self.input_ids, tokens_B[:, None].to(self.input_ids.device)], dim=1)
        return self._pass(next_pass, forward)

    def reorder(self, beam_B: Tensor) -> None:
        """Row b goes on from what was row `beam_B[b]`, which is of the same sample."""
        self.cache.reorder_cache(beam_B)
        self.input_ids = self.input_ids[beam_B.to(self.input_ids.device)]

    @torch.no_grad()
    def _pass(self, arguments: Callable[..., dict[str, Any]], forward: dict[str, Any]) -> Any:
        inputs = {"input_ids": self.input_ids, **self._carried}
        outputs = self.model(**arguments(self.model, inputs, logits_to_keep=1, **forward), return_dict=True)
        self._carried = after_pass(self.model, outputs, self._carried)
        return outputs


@contextmanager
def seeded(generator: torch.Generator | None) -> Iterator[None]:
    """transformers samples with torch's own generator: seed that from ours, and put it back afterwards."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    with torch.random.fork_rng([generator.device] if generator.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _stops(vlm: Vlm) -> Iterator[StoppingCriteriaList]:
    """The texts that end an answer of this checkpoint, as criteria.

    generate() finds them in the checkpoint's settings, and loses the tokenizer for them on the way to a callable.
    """
    settings: Any = vlm.model.generation_config
    texts = settings.stop_strings
    settings.stop_strings = None
    try:
        yield StoppingCriteriaList([StopStringCriteria(vlm.tokenizer, texts)] if texts else [])
    finally:
        settings.stop_strings = texts


@contextmanager
def _read_once(model: Any, branch: Branch | None, forward: Mapping[str, Any]) -> Iterator[None]:
    """Let `branch` read the prompts for a beam search, which would read each of them once per beam."""
    if branch is None:
        yield
        return

    def prefill(*args: Any, **kwargs: Any) -> Any:
        outputs = branch.prefill(**forward)
        outputs.logits = outputs.logits.repeat_interleave(branch.beams, dim=0)
        return outputs

    with reading_prompt(model, prefill):
        yield


@contextmanager
def _followed(cache: Any, scorer: Scorer | None) -> Iterator[None]:
    """Tell the scorer whenever the beams of `cache` are reordered: the only sign of it that a loop gives."""
    if scorer is None:
        yield
        return

    def both(beam_B: Tensor) -> None:
        # Looked up at each call: an adapter may have taught the cache's class to reorder more.
        type(cache).reorder_cache(cache, beam_B)
        scorer.reorder(beam_B)

    cache.reorder_cache = both
    try:
        yield
    finally:
        del cache.reorder_cache  # else cache and function keep each other in memory
