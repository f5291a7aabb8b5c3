"""A model to ask: a base with its settings, and an adapter if it has one; several that share a base."""

import copy
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from a3tune.adapters import load_adapter
from a3tune.config import ModelConfig, RunConfig
from a3tune.machine import processes
from a3tune.training.identity import other_base
from a3tune.vlm.load import Vlm, load_vlm

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is asked, before anything of it is loaded."""

    config: RunConfig
    adapter: Path | None

    def load(self) -> Vlm:
        """Model and adapter; warns of a base that the adapter was not trained on.

        Raises what `load_vlm` and `load_adapter` raise.
        """
        processes.join(cpu=self.config.model.device == "cpu")
        vlm = load_vlm(**asdict(self.config.model))
        if self.adapter is None:
            return vlm
        if processes.index() == 0 and (what := other_base(self.adapter, vlm.name)):
            logger.warning("%s: was trained on another base: %s; its answers may mean nothing", self.adapter, what)
        return replace(vlm, model=load_adapter(vlm.model, self.adapter))


def load_models(config: ModelConfig, adapters: Mapping[str, Path | None]) -> dict[str, Vlm]:
    """A model for each adapter, and the base alone for None, by name. All share the weights of the base in memory.

    Raises what `load_vlm` and `load_adapter` raise.
    """
    base = load_vlm(**asdict(config))
    shared = {id(value): value for value in (*base.model.parameters(), *base.model.buffers())}
    models: dict[str, Vlm] = {}
    for name, folder in adapters.items():
        models[name] = base
        if folder is not None:
            copied = copy.deepcopy(base.model, dict(shared))
            models[name] = replace(base, model=load_adapter(copied, folder))
            models[name].model.eval()
    return models
