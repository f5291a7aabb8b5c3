"""Fixed heads: ranked once, before the training, over samples of the training set. Knows batches, no Trainer."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from a3tune.attention.capture import capture_request, stack
from a3tune.attention.heads import votes
from a3tune.compat.training import is_deepspeed_zero3_enabled
from a3tune.errors import ConfigError
from a3tune.training.collate import split_batch
from a3tune.training.step import Alignment, is_routed
from a3tune.vlm.look import look

SAMPLES = 64


def evenly_spaced(count: int) -> range:
    """Which of so many training samples: at most `SAMPLES`."""
    return range(count)[:: max(1, count // SAMPLES)][:SAMPLES]


@torch.no_grad()
def calibrate(alignment: Alignment, model: Any, batches: Iterable[Mapping[str, Any]]) -> None:
    """Rank the heads by their mean visual ratio (Eq. 8) over the samples of all processes' batches.

    Every process calls this with its own batches, on its device, or with none; they agree on the ranking. Raises
    ConfigError where no process holds the model.
    """
    if is_deepspeed_zero3_enabled():
        raise ConfigError(
            "alignment.head_selection: fixed ranks the heads before the training, when ZeRO-3 has shared out the "
            "model already; use batch, running or another recipe"
        )
    # A process without a batch casts no votes, but its empty votes need the same shape.
    text = model.config.get_text_config()
    ratios = [torch.zeros(0, text.num_hidden_layers, text.num_attention_heads, device=model.device)]
    model.eval()
    for batch in batches:
        inputs, masks = split_batch(batch)
        request = capture_request(alignment.config.rows, **masks, each_row=False)
        captured = stack(look(model, inputs, masks, request, routed=is_routed(model)).attentions, request)
        ratios.append(votes(captured.ratio_BLH, captured.counted_B))
    selector = alignment.selector
    selector.calibrate(selector.mean_vote(torch.cat(ratios)))
