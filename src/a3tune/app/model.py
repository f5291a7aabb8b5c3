"""An answer with everything that a model looked at. Knows no page.

Letters as in `types.py`; G counts the rows of an answer: first the whole answer, then its tokens.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from a3tune.app.regions import ChosenRegion
from a3tune.attention.capture import capture_request, stack
from a3tune.attention.heads import HeadSelector
from a3tune.config import AlignmentConfig, EvaluationConfig
from a3tune.decoding import DECODERS, generate
from a3tune.vlm.encode import TOKEN_MASKS, Example, prepare
from a3tune.vlm.load import Vlm
from a3tune.vlm.look import answer_text, look, model_inputs, token_texts
from a3tune.vlm.patches import members, token_weights

BASE = "base model"
MAX_MAP_BYTES = 128 * 2**20
"""Of one answer's maps; tokens beyond it count for the whole answer only. 7B models: about 100 tokens."""

Heads = str | tuple[int, int]
"""`selected`: the mean over the R heads of Eq. 9. `all`: over all heads (Eq. 2). Else layer and head, from 0."""
WHOLE = 0
"""Row of the whole answer; its token i is row i + 1."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model said to one question about one image, and where it looked meanwhile."""

    model: str
    method: str
    question: str
    text: str
    tokens: tuple[str, ...]
    """Text of each token that has a map of its own; the one that ends the answer is empty."""
    maps_LHGN: NDArray[np.float16]
    """Attention on each image token that has a place."""
    ratio_LH: NDArray[np.float32]
    """Visual attention ratio of the whole answer (Eq. 8)."""
    selected_LH: NDArray[np.bool_]
    """The R heads with the highest ratio (Eq. 9)."""
    boxes: NDArray[np.float64]
    """`[N, 4]`: where each image token looks, in pixels of the image."""
    told: str = ""
    """Name of the region that the method was told to look at; empty: none."""

    def attention(self, heads: Heads = "selected", row: int = WHOLE) -> NDArray[np.float32]:
        """float32 `[N]`: the attention of a row, averaged over these heads."""
        if isinstance(heads, tuple):
            return self.maps_LHGN[*heads, row].astype(np.float32)
        chosen_LH = self.selected_LH if heads == "selected" else np.ones_like(self.selected_LH)
        return self.maps_LHGN[chosen_LH, row].astype(np.float32).mean(0)

    def holds(self, region: NDArray[np.bool_]) -> NDArray[np.float32]:
        """float32 `[N]` of zeros and ones: the image tokens that a region, bool `[H, W]`, holds."""
        return members(token_weights(region, self.boxes))


class Asker:
    """Asks the models, one question at a time, whoever asks."""

    def __init__(self, models: Mapping[str, Vlm], settings: EvaluationConfig) -> None:
        self.models = models
        self.settings = settings.over(AlignmentConfig())
        self._busy = threading.Lock()

    def ask(
        self,
        model: str,
        method: str,
        image: Image.Image,
        question: str,
        region: ChosenRegion | None = None,
    ) -> Iterator[str | Answer]:
        """The answer so far, again and again where the method allows it; at the end the `Answer`.

        Args:
            model: a name in `models`; `method`: one in `decoding.DECODERS`.
            region: for methods that are told where to look.

        Raises ConfigError, DataError or ModelError for what cannot be asked.
        """
        told: queue.SimpleQueue[str | Answer | BaseException] = queue.SimpleQueue()

        def work() -> None:
            try:
                with self._busy:
                    told.put(self._answer(model, method, image, question, region, told.put))
            except BaseException as error:  # goes to whoever asked
                told.put(error)

        threading.Thread(target=work, daemon=True).start()
        while True:
            message = told.get()
            if isinstance(message, BaseException):
                raise message
            yield message
            if isinstance(message, Answer):
                return

    def _answer(
        self,
        name: str,
        method: str,
        image: Image.Image,
        question: str,
        region: ChosenRegion | None,
        tell: Callable[[str], None],
    ) -> Answer:
        vlm, settings = self.models[name], self.settings
        asked = prepare(vlm, [image], question)
        inputs, _ = model_inputs(vlm, [asked], "left")
        held = None
        if region is not None:
            held = torch.from_numpy(members(token_weights(region.mask, asked.boxes)))[None].to(vlm.device)
        # The settings of evaluation.decoding are those of evaluation.decode alone.
        method_settings = settings.decoding if method == settings.decode else {}
        generated = generate(
            vlm,
            inputs,
            method,
            settings=method_settings,
            strategy=settings.strategy,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            regions_BN=held,
            watcher=_Grows(vlm, tell),
        )
        tokens = generated.tokens[0]
        answered = replace(asked, input_ids=torch.cat([asked.input_ids, tokens]))
        told = region.name if region is not None and getattr(DECODERS[method], "needs_regions", False) else ""
        return replace(_look(vlm, answered, name, method, question, settings), told=told)


@torch.no_grad()
def _look(vlm: Vlm, answered: Example, name: str, method: str, question: str, settings: EvaluationConfig) -> Answer:
    """One teacher-forced pass over question and answer; every row of the answer is captured by itself."""
    inputs, masks = model_inputs(vlm, [answered], "right")
    request = capture_request("answer", *(masks[mask] for mask in TOKEN_MASKS), each_row=True)
    rows_BGS = request.row_weights
    config = vlm.model.config.text_config
    row_bytes = 2 * config.num_hidden_layers * config.num_attention_heads * len(answered.boxes)
    kept = max(0, min(rows_BGS.shape[1], MAX_MAP_BYTES // row_bytes - 1))
    # The whole answer first: its ratio, and so the choice of heads, is then that of `evaluate` over answer rows.
    request = replace(request, row_weights=torch.cat([rows_BGS.mean(1, keepdim=True), rows_BGS[:, :kept]], 1))
    captured = stack(look(vlm.model, inputs, masks, request, logits_to_keep=1).attentions, request)
    ratio_BLH = captured.ratio_BLH[..., WHOLE]
    assert settings.heads is not None  # `over`
    selected_LH = HeadSelector(settings.heads).select(ratio_BLH, captured.counted_B)
    placed_N = ~np.isnan(answered.boxes[:, 0])
    tokens = answered.input_ids[answered.prompt_length :]
    return Answer(
        model=name,
        method=method,
        question=question,
        text=answer_text(vlm, tokens),
        tokens=token_texts(vlm.tokenizer, tokens.tolist())[:kept],
        maps_LHGN=captured.map_BLHN[0].half().cpu().numpy()[..., placed_N],
        ratio_LH=ratio_BLH[0].float().cpu().numpy(),
        selected_LH=selected_LH.cpu().numpy(),
        boxes=answered.boxes[placed_N],
    )


class _Grows:
    """Tells the text so far with every token."""

    def __init__(self, vlm: Vlm, tell: Callable[[str], None]) -> None:
        self._vlm, self._tell = vlm, tell

    def before_pass(self) -> None:
        """Nobody ends an answer of the explorer."""

    def after_token(self, tokens_BS: torch.Tensor) -> Sequence[bool]:
        self._tell(self._vlm.tokenizer.decode(tokens_BS[0], skip_special_tokens=True))
        return [False]
