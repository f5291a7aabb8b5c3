"""Trackers that the log of a training goes to, as transformers has them: TensorBoard, Weights & Biases, MLflow, ...

Pictures of patients go to TensorBoard alone, whose files lie in the run folder. Light: names are told before anything
slow is imported.
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

from a3tune.errors import ConfigError, RunError, in_short
from a3tune.run.folder import RunFolder

TRACKERS = {
    "tensorboard": ("tensorboard", "'a3tune[track]'"),
    "wandb": ("wandb", "wandb"),
    "trackio": ("trackio", "trackio"),
    "mlflow": ("mlflow", "mlflow"),
    "azure_ml": ("azureml", "azureml-core"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "dagshub": ("dagshub", "dagshub"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"),
    "kubeflow": ("", ""),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
}
"""transformers' name of a tracker -> the module that it needs, and what pip calls it."""
logger = logging.getLogger(__name__)


def check_trackers(names: Iterable[str]) -> None:
    """Raise ConfigError for a tracker that transformers does not know, or that is not installed."""
    for name in names:
        if name not in TRACKERS:
            near = get_close_matches(name, TRACKERS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(TRACKERS)}"
            raise ConfigError(f"training.report_to: {name} is no tracker; {hint}")
        module, package = TRACKERS[name]
        if module and find_spec(module) is None:
            raise ConfigError(f"training.report_to: {name} is not installed; pip install {package}")


def make_trackers(
    names: Sequence[str], folder: RunFolder, step: int, pictures: Callable[[], Sequence[Any]], *, first: bool
) -> list[Any]:
    """Callbacks for a Trainer that tell each tracker what is logged.

    Args:
        names: of `TRACKERS`.
        step: that the run goes on from; what TensorBoard was told of later ones is void.
        pictures: of the last evaluation; PIL images, always in the same order.
        first: whether this is the process that writes.
    """
    check_trackers(names)
    from a3tune.compat.training import get_reporting_integration_callbacks

    made = []
    for name, kind in zip(names, get_reporting_integration_callbacks(list(names)), strict=True):
        tracker: Any = type(f"{kind.__name__}OfA3", (_Tracker, kind), {"name": name})
        if name == "tensorboard" and first:
            made.append(tracker(_writer(folder, step)))
            made[-1].pictures = pictures
        else:
            made.append(tracker())
    return made


def flat(logs: Mapping[str, Any]) -> dict[str, Any]:
    """A log line whose values are all numbers: use of each expert, and how many heads of each layer were selected."""
    plain: dict[str, Any] = {}
    for name, value in logs.items():
        if isinstance(value, list):
            numbers = [one.count("1") if isinstance(one, str) else one for one in value]
            plain |= {f"{name}/{number}": one for number, one in enumerate(numbers, start=1)}
        else:
            plain[name] = value
    return plain


class _Tracker:
    """Put before one of transformers' callbacks: it gets plain numbers, and a tracker that fails stops no training."""

    name: str
    pictures: Callable[[], Sequence[Any]] | None = None
    _failed = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        try:
            return super().on_train_begin(args, state, control, **kwargs)  # type: ignore[misc]
        except Exception as error:
            raise RunError(
                f"training.report_to: {self.name} does not start: {in_short(error)}; log in to it or set it up, or "
                "leave it out"
            ) from error

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
        tell = super().on_log  # type: ignore[misc]
        return self._tried(lambda: tell(args, state, control, logs=flat(logs or {}), **kwargs))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.pictures is not None:
            self._tried(lambda: self._show(state.global_step))

    def _show(self, step: int) -> None:
        import numpy as np

        writer: Any = self.tb_writer  # type: ignore[attr-defined]
        for number, picture in enumerate(self.pictures() if self.pictures else (), start=1):
            # Numbers, not the samples' ids: those may be patients'.
            writer.add_image(f"eval/case {number}", np.asarray(picture), step, dataformats="HWC")
        writer.flush()

    def _tried(self, tell: Callable[[], Any]) -> Any:
        try:
            return tell()
        except Exception as error:
            if not self._failed:
                logger.warning("%s: fails (%s); the training goes on without it", self.name, in_short(error))
            self._failed = True


def _writer(folder: RunFolder, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    place = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(folder.tensorboard)
    return SummaryWriter(place, purge_step=step + 1 if step else None)
