"""A model to ask: a base with its settings, and an adapter if it has one."""

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from a3tune.adapters import load_adapter
from a3tune.config import RunConfig
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
