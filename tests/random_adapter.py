"""Adapters that change what the tiny model says, without a training."""

import copy
from pathlib import Path

import torch

from a3tune.adapters import add_adapter
from a3tune.config import AdapterConfig
from a3tune.vlm.load import Vlm


def save_random_adapter(base: Vlm, folder: Path) -> None:
    """One whose every part is random: with it the model says much, and nothing that means anything."""
    torch.manual_seed(0)
    adapted = add_adapter(copy.deepcopy(base.model), AdapterConfig(rank=2, expert_rank=2), control_ids=base.control_ids)
    for name, weight in adapted.named_parameters():
        if name.endswith((".B.weight", "lora_B.default.weight")):
            torch.nn.init.normal_(weight, std=0.5)
    adapted.save_pretrained(folder)
