"""What is trained: LoRA with routed query and key experts (A3MoE). Importing this package registers it with PEFT."""

from a3tune.adapters.config import A3MoEConfig
from a3tune.adapters.experts import GateLoad, KeyExperts, QueryExperts
from a3tune.adapters.model import A3MoEModel
from a3tune.adapters.peft import add_adapter, load_adapter
from a3tune.adapters.routing import Routing
from a3tune.adapters.statistics import balance_loss, gate_loads

__all__ = [
    "A3MoEConfig",
    "A3MoEModel",
    "GateLoad",
    "KeyExperts",
    "QueryExperts",
    "Routing",
    "add_adapter",
    "balance_loss",
    "gate_loads",
    "load_adapter",
]
