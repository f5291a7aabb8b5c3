"""A model of the same widths with few layers and weights of no meaning: to measure what a large one would take."""

from copy import deepcopy
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from a3tune.attention.capture import use_capture
from a3tune.vlm.load import Vlm, describe


class Shrinker:
    """Reads configuration and processor of a model, never its weights. Raises as `load_vlm`.

    Args:
        path: as `load_vlm` takes it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.config, self.processor = describe(path)

    @property
    def layers(self) -> int:
        """Decoder layers of the whole model."""
        return self.config.get_text_config().num_hidden_layers

    def whole(self) -> torch.nn.Module:
        """The whole model without any values (on the device `meta`), to count what it has."""
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(self.config)

    def model(self, layers: int, dtype: torch.dtype) -> Vlm:
        """A model with its first decoder layers only, at random, on the CPU; the vision tower is whole."""
        config: Any = deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
        model.generation_config.pad_token_id = self.processor.tokenizer.pad_token_id
        use_capture(model)
        return Vlm(model=model.eval(), processor=self.processor, name=self.path)
