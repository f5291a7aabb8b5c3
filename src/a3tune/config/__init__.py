"""Every setting of a run. Light: what needs no model starts at once."""

from a3tune.config.reading import Override, dump_config, load_config, load_given
from a3tune.config.settings import (
    AdapterConfig,
    AlignmentConfig,
    DataConfig,
    EvaluationConfig,
    LabelsConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)

__all__ = [
    "AdapterConfig",
    "AlignmentConfig",
    "DataConfig",
    "EvaluationConfig",
    "LabelsConfig",
    "ModelConfig",
    "Override",
    "RunConfig",
    "TrainingConfig",
    "dump_config",
    "load_config",
    "load_given",
]
