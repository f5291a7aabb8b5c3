"""Keys that nobody attends to: attention knocked out (Geva et al. 2023). Knows tensors, no images."""

import torch
from torch import Tensor


def hide(mask: Tensor | None, hidden_BT: Tensor, queries: int, causal: bool) -> Tensor:
    """The attention mask under which no position sees a hidden one, but itself: its row must see something.

    Args:
        mask: bool (True is seen) or additive, `[B, 1 or H, S, T]`; None shows everything, if `causal` only what is
            not later.
        hidden_BT: bool, the hidden key positions.
        queries: S; the last query stands at the last key.

    Returns a mask of the same kind, `[B, 1 or H, S, T]`; bool where there was none.
    """
    keys = hidden_BT.shape[1]
    position = torch.arange(keys, device=hidden_BT.device)
    own_ST = position == position[keys - queries :, None]
    seen = (~hidden_BT[:, None] | own_ST)[:, None]
    if mask is None:
        return seen & (position <= position[keys - queries :, None]) if causal else seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
