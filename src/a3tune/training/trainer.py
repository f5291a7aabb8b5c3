"""The Trainer of a run. Each concern of a training has a room of its own, in this order:

Trainer <- `counting.py` <- `log.py` <- `mixin.py` <- `checkpoint.py` <- `memory.py` <- A3Trainer
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from peft import PeftModel
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from a3tune.compat.training import is_deepspeed_zero3_enabled, one_device
from a3tune.config import AlignmentConfig
from a3tune.errors import ConfigError
from a3tune.training.collate import Collator
from a3tune.training.interrupt import Undisturbed
from a3tune.training.memory import SmallerPassesTrainer
from a3tune.training.score import VALIDATION
from a3tune.training.step import Alignment
from a3tune.training.validation import Validation
from a3tune.types import Sample


class A3Trainer(SmallerPassesTrainer):
    """Minimises L_LLM + weight * L_align (Eq. 12) over the adapter's parameters: an `AlignmentMixin`, with whole
    checkpoints, smaller passes where the memory is too small, and a validation.

    Heads are chosen anew in each half of a pass that was too large: where the device has too little memory, a lone
    process goes on with half the samples per pass and twice the passes.

    Raises `NonFiniteError` for a loss that is no number, RunError where the memory is too small for one sample.

    Args:
        model: what `add_adapter` returns, on a model that `load_vlm` returned.
        args: labels are not smoothed. On several GPUs start one process each (`accelerate launch`).
        samples: training set.
        collator: makes the batches.
        alignment: weight, until, heads, rows and variant.
        load_balance: weight of the routers' load-balance term; the adapter must then be made with `balance=True`.
        validation: what `evaluate` measures and logs, each name with `VALIDATION` before it; a callback says when
            (`validation.EveryFewSteps`).
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        samples: Sequence[Sample],
        collator: Collator,
        *,
        alignment: AlignmentConfig,
        load_balance: float = 0.0,
        validation: Validation | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        one_device(args)
        # Every adapted matrix takes part in every pass: no need to search for those that do not.
        args.ddp_find_unused_parameters = False
        super().__init__(
            model,
            args,
            collator,
            samples,
            alignment=Alignment(model, collator.vlm.processor, load_balance=load_balance, **asdict(alignment)),
            callbacks=callbacks,
        )
        if self.is_fsdp_enabled:
            # transformers' own list names layers of towers that this model may not have.
            layer: Any = model.get_base_model().get_decoder().layers[0]  # pyright: ignore
            plugin: Any = self.accelerator.state.fsdp_plugin
            plugin.transformer_cls_names_to_wrap = [type(layer).__name__]
        if validation is not None and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise ConfigError(
                "training.eval_steps: no process holds the whole model where FSDP or ZeRO-3 share out its weights; "
                "set it to 0 and evaluate afterwards, or use another recipe"
            )
        self.validation = validation
        for talkative in (PrinterCallback, ProgressCallback):
            self.remove_callback(talkative)
        self.collator = collator

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        if self.validation is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics = self.validation.measure(self.alignment)
        self.log({VALIDATION + name: value for name, value in metrics.items()})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_train_dataloader(self) -> Any:
        loader: Any = super().get_train_dataloader()
        # accelerate wraps the one that starts the processes.
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = Undisturbed(inner.worker_init_fn)
        return loader
