"""What every model of the zoo shares: its size, and its random weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SHAPE | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048}


def vocabulary(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What a text configuration has to know of a tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def save(model_class: Any, config: Any, processor: Any, folder: Path) -> None:
    """Random weights, always the same; none is zero, as Gemma's projector is before training."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(config)
        for weight in model.parameters():
            if weight.ndim > 1 and not weight.any():
                weight.normal_(std=0.1)
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
