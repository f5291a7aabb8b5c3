"""What our trainers override in transformers' Trainer, and what they ask of it."""

from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

__all__ = ["OVERRIDDEN", "get_reporting_integration_callbacks", "is_deepspeed_zero3_enabled", "one_device"]

OVERRIDDEN = {
    Trainer: (
        "_get_num_items_in_batch",
        "_load_optimizer_and_scheduler",
        "_save_checkpoint",
        "compute_loss",
        "evaluate",
        "get_batch_samples",
        "get_train_dataloader",
        "log",
        "save_model",
        "training_step",
    )
}
"""Methods that ours override; under other names they would never be called."""


def one_device(args: TrainingArguments) -> None:
    """No DataParallel: it cannot split masks that travel as keywords."""
    args._n_gpu = min(args.n_gpu, 1)
