"""transformers' attention functions and which one a model uses."""

from typing import Any

from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["attention_implementation", "sdpa_attention_forward", "sdpa_mask"]


def attention_implementation(model: Any) -> str:
    """Name of the attention function of the language model in a VLM."""
    return model.config.text_config._attn_implementation
