"""The configuration of an A3MoE adapter, saved as PEFT's `adapter_config.json`."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedConfig

from a3tune.errors import ConfigError, shown
from a3tune.models import A3MOE


class PeftType(StrEnum):
    """Ours, in the form that PEFT has its own in: it asks them for their `value`."""

    A3MOE = A3MOE


@dataclass
class A3MoEConfig(LoraConfig):
    """LoRA on all linear layers of the language model, Q-MoE on `q_proj`, K-MoE on `k_proj` (section 4.2.1).

    The defaults are those of Appendix C.1. `query_experts=0` or `key_experts=0` makes that matrix plain LoRA.
    `lora_dropout` holds for the experts too; LoRA's other options hold for the plain layers only. Values out of range
    raise ConfigError.
    """

    r: int = field(default=64, metadata={"help": "Rank of the plain LoRA layers."})
    lora_alpha: int = field(default=16, metadata={"help": "Alpha of the plain LoRA layers."})
    expert_rank: int = field(default=16, metadata={"help": "Rank of each expert, >= 1."})
    expert_alpha: float = field(default=8, metadata={"help": "Alpha of the experts; they are scaled by alpha / rank."})
    query_experts: int = field(default=4, metadata={"help": "Experts of Q-MoE, O^q; 0 for plain LoRA."})
    key_experts: int = field(default=8, metadata={"help": "Experts of K-MoE, O^k; 0 for plain LoRA."})
    top_experts: int = field(default=2, metadata={"help": "Experts kept per image token, B in 1..O^k."})
    router_hidden: int = field(default=64, metadata={"help": "Hidden width of the gates' MLP, >= 1."})
    key_text_tokens: bool = field(default=False, metadata={"help": "Route text tokens through K-MoE as well."})
    balance: bool = field(default=False, metadata={"help": "Keep the load-balance term of each pass for the trainer."})
    control_ids: list[int] = field(
        default_factory=list, metadata={"help": "Ids of the tokens that are no text; they are not part of the prompt."}
    )
    layout_ids: list[int] = field(
        default_factory=list,
        metadata={"help": "Ids of tokens that are not part of the prompt between two tokens of an image (line ends)."},
    )
    base: dict[str, Any] | None = field(default=None, metadata={"help": "Fingerprint of the base model; filled in."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.A3MOE  # type: ignore[assignment]
        for name, least in {"expert_rank": 1, "query_experts": 0, "key_experts": 0, "router_hidden": 1}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected an integer >= {least}, got {getattr(self, name)}")
        for name in ("control_ids", "layout_ids"):
            ids = getattr(self, name)
            if not (isinstance(ids, list) and all(type(index) is int and 0 <= index < 2**31 for index in ids)):
                raise ConfigError(f"{name}: expected a list of token ids, integers from 0 on, got {shown(ids)}")
        if self.key_experts and not 1 <= self.top_experts <= self.key_experts:
            raise ConfigError(f"top_experts: expected 1 to {self.key_experts} (key_experts), got {self.top_experts}")

    @property
    def routed(self) -> bool:
        """Whether any matrix is routed; a routed adapter cannot be merged."""
        return self.query_experts + self.key_experts > 0


def fingerprint(config: PreTrainedConfig) -> dict[str, Any]:
    """What tells a base model from another, even where all shapes fit."""
    text = config.get_text_config()
    return {
        "model_type": config.model_type,
        "text_model_type": text.model_type,
        "hidden_size": text.hidden_size,
        "layers": text.num_hidden_layers,
        "vocab": text.vocab_size,
    }
