"""The registered attention function: SDPA as ever, plus the attention of a few text rows on the image when asked.

Knows tensors, no images and no losses. The full attention is never stored: a custom autograd function computes the
wanted rows tile by tile, reduces them at once, and computes them again in the backward pass.

Letters beyond the legend of `types.py`: J key-value heads, Q query heads per key-value head (H = J * Q), C rows in use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from a3tune.attention.boost import Boost
from a3tune.attention.heads import visual_ratio
from a3tune.attention.hide import hide
from a3tune.compat.attention import attention_implementation, sdpa_attention_forward, sdpa_mask
from a3tune.errors import ConfigError, ModelError

ATTENTION = "a3tune"
"""Name under which the attention function is registered with transformers."""

TILE_BYTES, ACCELERATOR_TILE_BYTES = 8 * 2**20, 64 * 2**20
"""Size of one tile of fp32 scores [B, H, C, T]; the transient is a small multiple of it, however many rows are used. A
tile fits into a processor's cache; on an accelerator small ones would take longer to launch than to compute."""

Rows = Literal["after_image", "answer", "prompt"]


@dataclass(frozen=True, eq=False)
class CaptureRequest:
    """Which attention to bring out of every layer of one forward pass, as the forward keyword `capture`."""

    row_weights: Tensor
    """[B, S] or [B, G, S] float: weights of the query positions; each average sums to 1, or is all zero."""
    columns: Tensor
    """[B, N] int64: key positions of the image tokens, in feature order, -1 where padded or without a place."""
    text_columns: Tensor
    """[B, T] bool: key positions of the prompt's text (T_p of Eq. 8). Keys of later decoding steps may be left out."""
    length: int | None = None
    """How many key positions there are with this pass; None without a cache. Layers with a sliding window count on it:
    their caches drop the oldest keys, and what is dropped gets no attention there."""

    @cached_property
    def used_rows(self) -> tuple[Tensor, Tensor]:
        """The rows with a weight, [B, C] int64 (padded with row 0 of weight 0), and their weights, [B, G, C] fp32.

        Kept on the request because its size has to be read from the device: once per step, not once per layer.
        """
        weights_BGS = self.row_weights.float()
        if weights_BGS.ndim == 2:
            weights_BGS = weights_BGS[:, None]
        rows_BC = _positions(weights_BGS.ne(0).any(1))
        padding_BC = rows_BC < 0
        rows_BC = rows_BC.clamp_min(0)
        weights_BGC = torch.take_along_dim(weights_BGS, rows_BC[:, None], dim=2)
        return rows_BC, weights_BGC.masked_fill(padding_BC[:, None], 0.0)

    @cached_property
    def width(self) -> int:
        """How many key positions a layer must have for the columns to mean what they say."""
        last = int(self.columns.max()) if self.columns.numel() else -1
        return max(last + 1, self.text_columns.shape[1])


@dataclass(frozen=True, eq=False)
class Captured:
    """What `stack` makes of the layers' outputs; with G averages per sample the fields gain an axis G after H."""

    map_BLHN: Tensor
    """[B, L, H, N] or [B, L, H, G, N] fp32: attention on the image tokens, averaged over the rows; padding is zero."""
    ratio_BLH: Tensor
    """[B, L, H] or [B, L, H, G] fp32: the visual attention ratio (Eq. 8)."""
    counted_B: Tensor
    """[B] bool: samples that have both an image and rows; the others are zero throughout."""


def capture_request(
    rows: Rows,
    image_mask: Tensor,
    prompt_mask: Tensor,
    answer_mask: Tensor,
    placed_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    each_row: bool = False,
) -> CaptureRequest:
    """Turn the token masks of a batch into a request.

    `rows` says which text positions look: `answer`, those whose next token is an answer token; `prompt`, the prompt's
    text after the first run of image tokens; `after_image`, both (the published choice). With `each_row` every row is
    an average of its own (G = the most rows in the batch). Image tokens outside `placed_mask` show no place in the
    image and are no columns (None: there are no such). All masks are bool [B, S]; positions outside `attention_mask`
    count for nothing. Raises ConfigError for an unknown `rows`.
    """
    if attention_mask is not None:
        kept = attention_mask.bool()
        image_mask, prompt_mask, answer_mask = image_mask & kept, prompt_mask & kept, answer_mask & kept
    answer_rows = nn.functional.pad(answer_mask[:, 1:], (0, 1), value=False)
    run_ended = (~image_mask & (image_mask.cumsum(1) > 0)).cumsum(1) > 0
    prompt_rows = prompt_mask & run_ended
    choices = {"after_image": prompt_rows | answer_rows, "answer": answer_rows, "prompt": prompt_rows}
    if rows not in choices:
        raise ConfigError(f"rows: expected one of {', '.join(choices)}, got {rows!r}")
    chosen_BS = choices[rows]
    if each_row:
        row_weights = torch.zeros(*_positions(chosen_BS).shape, chosen_BS.shape[1], device=chosen_BS.device)
        sample, position = chosen_BS.nonzero(as_tuple=True)
        row_weights[sample, chosen_BS.cumsum(1)[sample, position] - 1, position] = 1.0
    else:
        row_weights = chosen_BS / chosen_BS.sum(1, keepdim=True).clamp_min(1)
    columns = _positions(image_mask)
    if placed_mask is not None:
        columns = columns.masked_fill(~placed_mask.gather(1, columns.clamp_min(0)), -1)
    return CaptureRequest(row_weights, columns, prompt_mask)


def use_capture(model: PreTrainedModel) -> None:
    """Switch the language model (not the vision tower) to our attention function, in place.

    Raises ModelError for a model without a `text_config` or one that does not take registered attention functions.
    """
    name = type(model).__name__
    if "text_config" not in model.config.sub_configs:
        raise ModelError(
            f"{name}: expected a vision-language model with a `text_config`, found none in its configuration"
        )
    model.set_attn_implementation({"text_config": ATTENTION})
    if attention_implementation(model) != ATTENTION:
        raise ModelError(f"{name}: does not take registered attention functions, so its attention cannot be captured")


def stack(attentions: Sequence[Tensor] | None, request: CaptureRequest) -> Captured:
    """Join `outputs.attentions` of a forward pass that was given `request`. Raises ModelError if they are not ours."""
    layers = _captured_layers(attentions)
    packed_shape = (*request.row_weights.shape[1:-1], request.columns.shape[1] + 1)
    if layers[0].shape[2:] != packed_shape:
        raise ModelError(
            f"attentions: expected [B, H, {', '.join(map(str, packed_shape))}] as the request asks, got "
            f"{list(layers[0].shape)}; call use_capture(model) and pass the same request as `capture=`"
        )
    packed = torch.stack([layer.to(layers[0].device) for layer in layers], dim=1)
    map_BLHN, mass_BLH = packed[..., :-1], packed[..., -1]
    has_rows_B = request.row_weights.flatten(1).ne(0).any(1)
    counted_B = has_rows_B & request.columns.ge(0).any(1)
    return Captured(map_BLHN, visual_ratio(map_BLHN, mass_BLH), counted_B.to(packed.device))


def check_captured(attentions: Sequence[Tensor] | None, model: nn.Module) -> None:
    """Make sure, at the first training step, that the alignment loss will reach the parameters.

    Gradients must reach every map from the first trainable query or key projection on; frozen early layers are fine.
    Raises ModelError if there are no maps, or if they are cut off, as reentrant checkpointing does without a word.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return
    reached = [layer.requires_grad for layer in _captured_layers(attentions)]
    first = min([*_trainable_layers(model), *(i for i, grad in enumerate(reached) if grad), len(reached) - 1])
    missing = [i for i, grad in enumerate(reached) if i >= first and not grad]
    if missing:
        raise ModelError(
            f"captured attention: no gradient reaches the maps of layers {', '.join(map(str, missing))}, so they would "
            "not be aligned. Reentrant activation checkpointing does this: set activation_checkpointing_kwargs="
            '{"use_reentrant": False} (gradient_checkpointing_kwargs in prepare_model_for_kbit_training). If there is '
            "no checkpointing, train the query or key projections of these layers or of earlier ones"
        )


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    capture: CaptureRequest | None = None,
    boost: Boost | None = None,
    hidden: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """SDPA, and as a second output the captured attention when `capture` is given: [B, H, N + 1] or [B, H, G, N + 1].
    `boost` changes what the last position attends to; what is captured is the attention without it. `hidden`, bool
    [B, T], are key positions that no other position attends to.

    The last column is the mass on image and prompt columns, the denominator of Eq. 8. It is fp32 (fp64 when the queries
    are), and attention dropout does not touch it. Raises ModelError when the layer's keys are not the positions that
    the request speaks of. `scaling` has no default: under another name the scores would be those of another model.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and query.shape[2] > 1
    if hidden is not None:
        attention_mask = hide(attention_mask, hidden.to(query.device), query.shape[2], causal)
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
    )
    if boost is not None and (row_BHD := boost.row(module, query, key, value, attention_mask, scaling)) is not None:
        output[:, -1] = row_BHD
    if capture is None:
        return output, None
    _check_positions(module, query, key, capture, sliding_window)
    dropped = 0 if sliding_window is None or capture.length is None else max(0, capture.length - key.shape[2])
    columns = capture.columns.to(query.device) - dropped
    columns = columns.masked_fill(columns < 0, -1)
    rows_BC, weights_BGC = capture.used_rows
    # Half precision is too coarse for the softmax; the weights' precision is that of the whole computation.
    precision = torch.promote_types(query.dtype, torch.float32)
    packed_BHGN: Tensor = _RowAttention.apply(  # pyright: ignore[reportAssignmentType]
        query,
        key,
        attention_mask,
        rows_BC.to(query.device),
        weights_BGC.to(query.device, precision),
        columns,
        _denominator(columns, capture.text_columns[:, dropped:], key).to(precision),
        scaling,
        causal,
    )
    return output, packed_BHGN if capture.row_weights.ndim == 3 else packed_BHGN.squeeze(2)


AttentionInterface.register(ATTENTION, attention_forward)
# Without a mask function of the same name transformers would pass no mask at all, and padding would be attended to.
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class _RowAttention(torch.autograd.Function):
    """sum_s w[b, g, s] * softmax(scores)[b, h, s, :] at the image columns, with the denominator of Eq. 8 appended.

    Saves its inputs alone, which SDPA keeps anyway. Every pass over a tile of scores counts: on a device without fused
    kernels they, not the products, are what the capture costs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_BHSD: Tensor,
        key_BJTD: Tensor,
        mask: Tensor | None,
        rows_BC: Tensor,
        weights_BGC: Tensor,
        columns_BN: Tensor,
        denominator_BT: Tensor,
        scaling: float,
        causal: bool,
    ) -> Tensor:
        b, h, keys = query_BHSD.shape[0], query_BHSD.shape[1], key_BJTD.shape[2]
        taken = weights_BGC.new_zeros(b, h, weights_BGC.shape[1], columns_BN.shape[1] + 1)
        with torch.autocast(query_BHSD.device.type, enabled=False):
            key = key_BJTD.to(weights_BGC.dtype, memory_format=torch.contiguous_format)
            for rows, weights in _tiles(b * h * keys, rows_BC, weights_BGC):
                _, attention, seen = _attention(query_BHSD, key, mask, rows, scaling, causal)
                weights = weights[:, None] * seen
                # Both orders are the same sum; the cheaper one keeps the result within a tile.
                if weights.shape[2] < rows.shape[1]:
                    taken += _take(weights @ attention, columns_BN, denominator_BT)
                else:
                    taken += weights @ _take(attention, columns_BN, denominator_BT)
        ctx.save_for_backward(query_BHSD, key_BJTD, mask, rows_BC, weights_BGC, columns_BN, denominator_BT)
        ctx.scaling, ctx.causal = scaling, causal
        return taken

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query_BHSD, key_BJTD, mask, rows_BC, weights_BGC, columns_BN, denominator_BT = ctx.saved_tensors
        b, h, length, d = query_BHSD.shape
        keys, half, grad_taken = key_BJTD.shape[2], query_BHSD.dtype, grad_outputs[0].to(weights_BGC.dtype)
        grad_query_BSHD = torch.zeros_like(query_BHSD.transpose(1, 2), memory_format=torch.contiguous_format)
        grad_key = torch.zeros_like(key_BJTD, dtype=weights_BGC.dtype, memory_format=torch.contiguous_format)
        first_row_B = torch.arange(b, device=rows_BC.device)[:, None] * length
        with torch.autocast(query_BHSD.device.type, enabled=False):
            half_key = key_BJTD.contiguous()
            key = half_key.to(weights_BGC.dtype)
            for rows, weights in _tiles(b * h * keys, rows_BC, weights_BGC):
                query, attention, seen = _attention(query_BHSD, key, mask, rows, ctx.scaling, ctx.causal)
                weights = weights[:, None] * seen
                if weights.shape[2] < rows.shape[1]:
                    grad = weights.mT @ _spread(grad_taken, columns_BN, denominator_BT)
                else:
                    grad = _spread(weights.mT @ grad_taken, columns_BN, denominator_BT)
                grad = torch.ops.aten._softmax_backward_data(grad, attention, -1, attention.dtype)
                # As in flash attention, the two products take the precision of the queries and keys.
                grad = grad.view(*query.shape[:3], keys).to(half)
                grad_rows = (grad @ half_key).mul_(ctx.scaling).view(b, h, rows.shape[1], d).transpose(1, 2)
                flat_rows = (rows + first_row_B).flatten()
                grad_query_BSHD.flatten(0, 1).index_add_(0, flat_rows, grad_rows.flatten(0, 1))
                grad_key += grad.mT @ query.to(half)
        return grad_query_BSHD.transpose(1, 2), grad_key.to(half), *[None] * 7


def _tiles(scores_per_row: int, rows_BC: Tensor, weights_BGC: Tensor):
    """Cut the rows so that the fp32 scores of one piece fit in a tile."""
    most = TILE_BYTES if rows_BC.device.type == "cpu" else ACCELERATOR_TILE_BYTES
    size = max(1, most // (4 * max(1, scores_per_row)))
    return zip(rows_BC.split(size, 1), weights_BGC.split(size, 2), strict=True)


def _attention(
    query_BHSD: Tensor, key_BJTD: Tensor, mask: Tensor | None, rows_BC: Tensor, scaling: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows' scaled queries [B, J, Q * C, D], their attention [B, H, C, T] in the precision of the keys, and which
    of them see a key at all, [B, 1 or H, 1, C]: the others' attention means nothing."""
    (b, j, keys, d), c = key_BJTD.shape, rows_BC.shape[1]
    h = query_BHSD.shape[1]
    sample_B = torch.arange(b, device=rows_BC.device)[:, None]
    rows_BCHD = query_BHSD.transpose(1, 2)[sample_B, rows_BC]
    # The query heads that share a key head become rows of one product: no repeated keys, one large matmul per key head.
    query = rows_BCHD.transpose(1, 2).to(key_BJTD.dtype).mul(scaling).reshape(b, j, h // j * c, d)
    scores = (query @ key_BJTD.mT).view(b, h, c, keys)
    seen = torch.ones((), dtype=torch.bool, device=scores.device)
    # Adding a small bias that all heads share is 7 times as fast on a processor as filling the scores by a mask.
    if mask is not None:
        mask_BHCT = mask.expand(b, -1, -1, -1).transpose(1, 2)[sample_B, rows_BC].transpose(1, 2)
        if mask.dtype == torch.bool:
            forbidden, bias = ~mask_BHCT, _bias(~mask_BHCT, scores.dtype)
        else:
            forbidden, bias = mask_BHCT <= torch.finfo(mask.dtype).min / 2, mask_BHCT
        seen = ~forbidden.all(-1)[:, :, None]
        # A row that sees nothing is left open: its softmax must be a number.
        scores.add_(bias.masked_fill(~seen.mT, 0.0))
    elif causal:
        future_BCT = torch.arange(keys, device=rows_BC.device) > rows_BC[..., None]
        scores.add_(_bias(future_BCT[:, None], scores.dtype))
    return query, scores.softmax(-1), seen


def _bias(forbidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(forbidden, dtype=dtype).masked_fill_(forbidden, -torch.inf)


def _take(attention_BHCT: Tensor, columns_BN: Tensor, denominator_BT: Tensor) -> Tensor:
    """[B, H, C, T] -> [B, H, C, N + 1]: the image columns (zero where padded), and the sum over the denominator's."""
    index = columns_BN.clamp_min(0)[:, None, None].expand(*attention_BHCT.shape[:3], -1)
    image = attention_BHCT.gather(-1, index) * columns_BN.ge(0)[:, None, None]
    return torch.cat([image, attention_BHCT @ denominator_BT[:, None, :, None]], dim=-1)


def _spread(grad_BHCN: Tensor, columns_BN: Tensor, denominator_BT: Tensor) -> Tensor:
    """The transpose of `_take`: [B, H, C, N + 1] -> [B, H, C, T]."""
    index = columns_BN.clamp_min(0)[:, None, None].expand(*grad_BHCN.shape[:3], -1)
    spread = grad_BHCN[..., -1:] * denominator_BT[:, None, None]
    return spread.scatter_add_(-1, index, grad_BHCN[..., :-1] * columns_BN.ge(0)[:, None, None])


def _denominator(columns_BN: Tensor, text_columns_BT: Tensor, key_BJTD: Tensor) -> Tensor:
    """[B, T] fp32: 1 at the image and prompt columns (T_v and T_p of Eq. 8)."""
    text = text_columns_BT.to(key_BJTD.device)
    marks = nn.functional.pad(text, (0, key_BJTD.shape[2] - text.shape[1]), value=False).float()
    return marks.scatter_reduce_(1, columns_BN.clamp_min(0), columns_BN.ge(0).float(), reduce="amax")


def _positions(mask_BS: Tensor) -> Tensor:
    """Where each row of a bool mask is True, in order, padded with -1 to the most there are: [B, N] int64."""
    counts = mask_BS.sum(1, keepdim=True)
    longest = int(counts.max()) if counts.numel() else 0
    order = mask_BS.logical_not().byte().argsort(dim=1, stable=True)[:, :longest]
    return order.masked_fill(torch.arange(longest, device=mask_BS.device) >= counts, -1)


def _captured_layers(attentions: Sequence[Tensor] | None) -> Sequence[Tensor]:
    if not attentions:
        raise ModelError(
            "attentions: expected one captured map per layer, got none; call use_capture(model), and pass both "
            "`capture=` and `output_attentions=True` to the forward pass"
        )
    return attentions


def _trainable_layers(model: nn.Module) -> set[int]:
    """The decoder layers with something trainable in front of their attention scores."""
    return {
        int(module.layer_idx)  # pyright: ignore[reportArgumentType]
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "num_key_value_groups")
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and not name.startswith(("v_proj", "o_proj"))
    }


def _check_positions(
    module: nn.Module, query: Tensor, key: Tensor, request: CaptureRequest, window: int | None
) -> None:
    layer, rows, keys = getattr(module, "layer_idx", "?"), query.shape[2], key.shape[2]
    if request.row_weights.shape[-1] != rows:
        raise ModelError(
            f"capture, layer {layer}: row_weights are for {request.row_weights.shape[-1]} positions, but the forward "
            f"pass has {rows}; make a request of this pass's own length (one position at a decoding step)"
        )
    if window is None:
        # Keys that a layer dropped without naming a window would move all columns.
        if (spoken := max(request.width, request.length or 0)) > keys:
            raise ModelError(
                f"capture, layer {layer}: the request speaks of {spoken} key positions, but this layer sees "
                f"{keys} keys; make a request of this pass's own tokens and those in its cache"
            )
    # A sliding-window cache that is full has dropped its oldest keys: the columns would point at other tokens.
    elif (request.length is None and rows < keys and keys >= window) or (request.length or keys) < request.width:
        raise ModelError(
            f"capture, layer {layer}: the request speaks of {request.width} key positions, but this layer sees {keys} "
            f"keys of a sliding window of {window}, so image columns have moved or are gone; give the request the "
            "`length` of this pass with its cache, or capture in one pass over the whole sequence, without a cache"
        )
