"""Similarities -> the segments that guide the attention (Eq. 3). Knows numbers only."""

import numpy as np


def top_k(similarity: np.ndarray, k: int | None = None, threshold: float | None = None) -> np.ndarray:
    """Indices of the segments most similar to the prompt, best first; of equals the earlier one (Eq. 3).

    Eq. 3 keeps what reaches a threshold tau_K. `k` is its published form, where tau_K adapts to each prompt so that K
    segments reach it; `threshold` is a fixed tau. With both, at most k of those above the threshold; with neither, all.
    `similarity` is [M]; the result is int [at most M].
    """
    order = np.argsort(-np.asarray(similarity), kind="stable")
    if threshold is not None:
        order = order[np.asarray(similarity)[order] >= threshold]
    return order[:k]
