"""A model to ask: a base with its settings, and an adapter if it has one."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from a3tune.adapters import load_adapter
from a3tune.config import RunConfig
from a3tune.machine import processes
from a3tune.vlm.load import Vlm, load_vlm


@dataclass(frozen=True, slots=True)
class Subject:
    """What is asked, before anything of it is loaded."""

    config: RunConfig
    adapter: Path | None

    def load(self) -> Vlm:
        """Model and adapter. Raises what `load_vlm` and `load_adapter` raise."""
        processes.join(cpu=self.config.model.device == "cpu")
        vlm = load_vlm(**asdict(self.config.model))
        return vlm if self.adapter is None else replace(vlm, model=load_adapter(vlm.model, self.adapter))
