"""OPERA (Huang et al. 2024): beams that shun tokens which lean on one earlier word, and go back when they all did.

Letters: B counts the beams of one sample, C the candidates of a beam, S the tokens of the answer so far.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import log
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

from a3tune.adapters.routing import Routing
from a3tune.attention.capture import CaptureRequest
from a3tune.compat.generation import CACHE
from a3tune.config.ranges import Count, NonNegative, Positive
from a3tune.decoding.base import Inputs, require_capture
from a3tune.decoding.beams import Beams, MeanOfAnswer, MeanWithPrompt
from a3tune.decoding.branches import image_mask
from a3tune.decoding.loop import Branch
from a3tune.errors import ModelError
from a3tune.vlm.load import Vlm

FLOOR = -999.0
"""Logit of all tokens that are no candidates, as published."""
LARGEST_PENALTY = {"code": 65504.0, "paper": 900.0}
"""Products of many scaled weights have no bound. By variant; published is the largest number of 16 bits, but with more
than 900 a candidate falls below `FLOOR`, and tokens that are no candidates are chosen."""


@dataclass(frozen=True)
class Opera:
    """Settings of the paper's Appendix B (for reports it takes `scale` 25 and `threshold` 25 with LLaVA-Med-1.5).

    Each sample of a batch is searched on its own after the prompts were read together: samples go back at different
    steps. The history that decides on going back belongs to the rank of a beam, as published.
    """

    name: ClassVar[str] = "opera"
    strategy: ClassVar[str] = "beam"
    searches: ClassVar[bool] = True
    scale: Positive = 50.0
    """Attention weights times this are multiplied down each column."""
    threshold: Count = 15
    """More steps than this that lean on the same token make the search go back behind it."""
    candidates: Annotated[int, Field(strict=True, ge=2)] = 5
    """Tokens that each beam looks ahead to; also how often the search goes back to one position."""
    penalty: NonNegative = 1.0
    """Weight of the over-trust penalty."""
    window: Count = 512
    """Latest tokens of the answer that may be leant on."""
    initial_tokens: Count = 10
    """So many tokens are drawn to the image instead of being penalised, and are never gone back to."""
    variant: Literal["code", "paper"] = "code"
    """code: what the published numbers were made with, down to its slips. An answer's score is a mean over the tokens
    of its prompt, where an image is one, and its own without the end token; penalties have 16 bits, so that small ones
    are 0 and lean on nothing; what must not be chosen again is made as unlikely as the least likely token, and stays so
    at later steps; a second return to a step keeps the answers that ended since the first. paper: a mean over the
    answer with its end token, no rounding, choices forbidden, such answers dropped."""

    def check(self, vlm: Vlm) -> None:
        """Raises ModelError when attention cannot be captured. Whether an answer fits into the window of a model that
        has sliding windows (Gemma 3) shows only with the prompt."""
        require_capture(vlm, self.name)

    def __call__(
        self,
        vlm: Vlm,
        inputs: Inputs,
        config: GenerationConfig,
        *,
        regions_BN: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        branch = Branch(vlm, inputs)
        self._check_windows(vlm, branch, config)
        with _positions(vlm) as positions:
            first = branch.prefill().logits[:, -1].float()
        answers = []
        for sample, logits_V in enumerate(first):
            last = positions[0][..., sample, None, -1:]  # M-RoPE has one more axis in front
            reader = _Reader(vlm, inputs, branch.cache, last, sample, config)
            scoring = MeanWithPrompt(reader.prompt_length()) if self.variant == "code" else MeanOfAnswer()
            answers.append(self._answer(reader, reader.allowed(logits_V), config, scoring))
        padding: Any = config.pad_token_id
        return nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=padding)

    def _check_windows(self, vlm: Vlm, branch: Branch, config: GenerationConfig) -> None:
        """Layers with sliding windows forget what is needed again when tokens are taken back out of the cache."""
        limit = min((layer.get_max_length() for layer in branch.cache.layers if layer.is_sliding), default=None)
        longest = branch.input_ids.shape[1] + (config.max_new_tokens or 0) + self.candidates
        if limit is not None and longest >= limit:
            raise ModelError(
                f"{self.name}: prompt, answer and candidates take {longest} tokens, but {vlm.name} has layers with a "
                f"sliding window of {limit}, and it must not be filled; ask for less with max_new_tokens"
            )

    def _answer(self, reader: "_Reader", logits_V: Tensor, config: GenerationConfig, scoring: MeanOfAnswer) -> Tensor:
        """The best answer to one sample, `[S]`, given the logits after its prompt."""
        beams = Beams.start(reader.beams, logits_V.device)
        logits_BV = logits_V.expand(reader.beams, -1)
        retrospection = _Retrospection(self)
        while True:
            tokens_BC = logits_BV.topk(self.candidates).indices
            penalty_BC, place_BC = self.over_trust(reader.look_ahead(tokens_BC), beams.products_BS, reader.image)
            back = retrospection.check(beams, place_BC)
            if back is None:
                candidates_BC = logits_BV.gather(1, tokens_BC) - penalty_BC
                others_BV = logits_BV.masked_fill(logits_BV.isfinite(), FLOOR)
                scores_BV = others_BV.scatter(1, tokens_BC, candidates_BC)
            else:
                beams, forbidden = back
                scores_BV = self._forbid(reader.read_again(beams.tokens_BS), forbidden)
            beams = beams.choose(scores_BV, config, scoring)
            if beams.done:
                return beams.finished[0][1]
            logits_BV, row_B1T = reader.read(beams.tokens_BS[:, -1], beams.parent_B)
            beams = replace(beams, products_BS=self._products(row_B1T, beams.products_BS)[:, 0])

    def _forbid(self, logits_BV: Tensor, forbidden: Tensor) -> Tensor:
        """The same with the choices `forbidden` (places in it, flattened) made impossible, or as good as that."""
        if self.variant == "paper":
            return logits_BV.flatten().index_fill(0, forbidden, -torch.inf).view_as(logits_BV)
        least_B1 = logits_BV.masked_fill(logits_BV.isneginf(), torch.inf).amin(1, keepdim=True)
        mask = torch.zeros_like(logits_BV, dtype=torch.bool).flatten().index_fill(0, forbidden, value=True)
        return torch.where(mask.view_as(logits_BV), least_B1, logits_BV)

    def over_trust(self, rows_BCT: Tensor, products_BS: Tensor, image_N: Tensor) -> tuple[Tensor, Tensor]:
        """Penalty of each candidate, `[B, C]`, and which token of the answer it leans on most, int64 `[B, C]`.

        Args:
            rows_BCT: attention of the candidates on the prompt, the answer and themselves; each row sums to 1.
            products_BS: log of the product down each column of the answer so far.
            image_N: int64, positions of the image tokens.
        """
        # The columns of the local window: at most as many as the answer with its candidate has tokens.
        columns = self._products(rows_BCT, products_BS)[..., -self.window :] + log(1e-7)
        if self.variant == "code":
            columns = columns.exp().half().float()
        trust, place = columns.max(-1)
        forgotten = products_BS.shape[1] + 1 - columns.shape[-1]
        if products_BS.shape[1] < self.initial_tokens:
            trust = -rows_BCT[..., image_N].sum(-1)
        else:
            trust = (trust if self.variant == "code" else trust.exp()).nan_to_num()  # infinity: the largest number
        return (self.penalty * trust).clamp_max(LARGEST_PENALTY[self.variant]), place + forgotten

    def _products(self, rows_BCT: Tensor, products_BS: Tensor) -> Tensor:
        """`products_BS` with one more row and column, for each of C rows: `[B, C, S + 1]`.

        The whole map is never needed, since each column's product only ever grows by a factor.
        """
        answer = products_BS.shape[1] + 1
        return nn.functional.pad(products_BS, (0, 1))[:, None] + (self.scale * rows_BCT[..., -answer:]).log()


class _Retrospection:
    """When to go back, and where to: the search's past states, what they leant on, and what was tried there."""

    def __init__(self, opera: Opera) -> None:
        self.opera = opera
        self.states: list[Beams] = []
        self.places: list[list[int]] = []
        """Per step and beam: the token of the answer that most candidates lean on."""
        self.tries: Counter[int] = Counter()
        self.forbidden: dict[int, Tensor] = {}
        self.latest: int | None = None
        """The step gone back to last."""

    def check(self, beams: Beams, place_BC: Tensor) -> tuple[Beams, Tensor] | None:
        """The state to go back to and the choices forbidden there (places in its flattened `[B, V]`), or None."""
        self.states.append(beams)
        place_B = place_BC.mode(1).values
        self.places.append(place_B.tolist())
        step = self._step(int(place_B.mode().values))
        # The latest choice of all is the one that is just being made: there is nothing to take back.
        if step is None or step >= len(self.states) - 1:
            return None
        if self.opera.variant == "code" and self.latest is not None:
            # Published code goes on with the very answers it kept for that step: it finds those of later steps there.
            self.states[self.latest] = replace(self.states[self.latest], finished=beams.finished)
        self.latest = step
        self.tries[step] += 1
        undone = self.states[step + 1]
        forbidden = torch.cat([undone.choice_B, self.forbidden.get(step, undone.choice_B[:0])])
        later = self.opera.variant == "code"
        kept = {at: choices for at, choices in self.forbidden.items() if at < step or (later and at > step + 1)}
        self.forbidden = kept | {step: forbidden}
        del self.states[step + 1 :], self.places[step + 1 :]
        return self.states[step], forbidden

    def _step(self, place: int) -> int | None:
        """The step to go back to, when all beams leant on the token `place` for long enough."""
        if place < self.opera.initial_tokens:
            return None
        for places in zip(*self.places, strict=True):
            if places.count(place) <= self.opera.threshold:
                return None
        return next((step for step in (place + 1, place) if self.tries[step] < self.opera.candidates), None)


class _Reader:
    """The beams of one sample in the model: reads their tokens, and tells what its last layer attends to."""

    def __init__(
        self, vlm: Vlm, inputs: Inputs, cache: DynamicCache, position: Tensor, sample: int, config: GenerationConfig
    ) -> None:
        """`cache` holds the prompts of all samples and stays as it is; `position` is that of the prompt's last token,
        `[..., 1, 1]`."""
        self.model: Any = vlm.model
        self.beams = beams = config.num_beams or 1
        self.suppressed = torch.tensor(config.suppress_tokens, device=vlm.device)
        self.cache: Any = copy.copy(cache)
        # Such caches put new tensors in the place of old ones and never write into them: copies can share them.
        self.cache.layers = [copy.copy(layer) for layer in cache.layers]
        self.cache.batch_select_indices(torch.full((beams,), sample, device=vlm.device))
        self.prompt = inputs["attention_mask"][sample].bool()
        self.image = image_mask(vlm, inputs)[sample].nonzero().flatten()
        """int64 `[N]`: positions of the image tokens."""
        self.position = position

    def prompt_length(self) -> int:
        """Tokens of the prompt as published code counts them: each run of image tokens is one."""
        follows = self.image.diff() == 1
        return int(self.prompt.sum()) - int(follows.sum())

    def allowed(self, logits: Tensor) -> Tensor:
        """The same without the tokens that no answer may hold."""
        return logits.index_fill(-1, self.suppressed, -torch.inf)

    def read(self, tokens_B: Tensor, parent_B: Tensor) -> tuple[Tensor, Tensor]:
        """Beams go on from their parents with a token each: logits `[B, V]`, and what the tokens attend to `[B, 1, T]`.

        Attention is after softmax, the largest of all heads, and each row is divided by its sum.
        """
        self.cache.reorder_cache(parent_B)
        return self._pass(tokens_B[:, None])

    def look_ahead(self, tokens_BC: Tensor) -> Tensor:
        """What each of C possible next tokens would attend to, `[B, C, T]`; nothing is kept of them.

        One pass for all: they stand at the same position, and none sees another.
        """
        _, rows_BCT = self._pass(tokens_BC, siblings=True)
        self.cache.crop(-tokens_BC.shape[1])
        # The keys are the prompt, the answer and all siblings; a candidate sees of the siblings only itself.
        before = rows_BCT.shape[-1] - tokens_BC.shape[1]
        itself_BC = rows_BCT[..., before:].diagonal(dim1=1, dim2=2)
        return torch.cat([rows_BCT[..., :before], itself_BC[..., None]], dim=-1)

    def read_again(self, tokens_BS: Tensor) -> Tensor:
        """Logits `[B, V]` after other answers than those read so far."""
        self.cache.crop(len(self.prompt) - self.cache.get_seq_length())
        return self._pass(tokens_BS)[0]

    def _pass(self, tokens_BC: Tensor, *, siblings: bool = False) -> tuple[Tensor, Tensor]:
        """Logits after the last token, and the attention of the last token, or of each of the siblings."""
        count, device = tokens_BC.shape[1], tokens_BC.device
        answer = self.cache.get_seq_length() - len(self.prompt)
        one = torch.eye(count, dtype=torch.bool, device=device)
        place = torch.arange(count, device=device)
        before = nn.functional.pad(self.prompt, (0, answer), value=True).expand(count, -1)
        mask = torch.cat([before, one if siblings else torch.ones_like(one).tril()], dim=1)
        rows = one if siblings else one[-1:]
        keys = torch.arange(mask.shape[1], device=device)
        request = CaptureRequest(
            row_weights=rows.float().expand(self.beams, -1, -1),
            columns=keys.expand(self.beams, -1),
            text_columns=torch.zeros(self.beams, 0, dtype=torch.bool, device=device),
        )
        position = self.position + 1 + answer + (torch.zeros_like(place) if siblings else place)
        with _last_layer(self.model, request) as captured:
            outputs = self.model(
                input_ids=tokens_BC,
                attention_mask=mask.expand(self.beams, 1, -1, -1),
                position_ids=position.expand(*position.shape[:-2], self.beams, count),
                **{CACHE: self.cache},
                use_cache=True,
                logits_to_keep=1,
                routing=Routing(torch.zeros_like(tokens_BC, dtype=torch.bool), None),  # no prompt, no image
            )
        rows_BGT = captured[0][..., :-1].amax(1).float()
        return self.allowed(outputs.logits[:, -1].float()), rows_BGT / rows_BGT.sum(-1, keepdim=True)


@contextmanager
def _positions(vlm: Vlm) -> Iterator[list[Tensor]]:
    """The `position_ids` of the passes within, as the language model gets them: families count differently."""
    positions: list[Tensor] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        positions.append(kwargs["position_ids"])

    decoder: Any = vlm.model.get_decoder()
    hook = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield positions
    finally:
        hook.remove()


@contextmanager
def _last_layer(model: Any, request: CaptureRequest) -> Iterator[list[Tensor]]:
    """The last layer's captured attention `[B, H, G, T + 1]` of the passes within; the other layers are not asked."""
    attention: nn.Module = model.get_decoder().layers[-1].self_attn
    captured: list[Tensor] = []

    def ask(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "capture": request, "output_attentions": True}

    hooks = [
        attention.register_forward_pre_hook(ask, with_kwargs=True),
        attention.register_forward_hook(lambda module, args, output: captured.append(output[1])),
    ]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()
