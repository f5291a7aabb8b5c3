"""What torch's autograd tells of itself by private names only."""

import torch


def in_backward() -> bool:
    """Whether this thread is in a backward pass: then a forward pass is one that activation checkpointing replays."""
    return torch._C._current_graph_task_id() != -1
