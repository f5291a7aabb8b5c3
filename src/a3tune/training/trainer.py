"""`step.py` in a `transformers.Trainer`. Each other concern of a training has a room of its own, in this order:

Trainer <- `counting.py` <- `checkpoint.py` <- `log.py` <- `memory.py` <- A3Trainer
"""

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from a3tune.adapters import A3MoEConfig
from a3tune.compat.peft import disable_input_dtype_casting
from a3tune.compat.training import is_deepspeed_zero3_enabled, one_device
from a3tune.config import AlignmentConfig
from a3tune.errors import ConfigError
from a3tune.training.calibrate import calibrate, evenly_spaced
from a3tune.training.collate import Collator
from a3tune.training.interrupt import Undisturbed
from a3tune.training.memory import SmallerPassesTrainer
from a3tune.training.nonfinite import check_finite
from a3tune.training.score import VALIDATION
from a3tune.training.step import Alignment, step_losses
from a3tune.training.validation import Validation
from a3tune.types import Sample


class A3Trainer(SmallerPassesTrainer):
    """Minimises L_LLM + weight * L_align (Eq. 12) over the adapter's parameters.

    L_LLM is the mean over all answer tokens and L_align (Eq. 10) that over ALL samples of an optimiser step: gradient
    accumulation and processes change nothing, and a sample without labels contributes zero. With `alignment.weight` 0
    no attention is captured.

    Heads are chosen by the samples of one forward pass on all processes together, unless they are fixed
    (`HeadSelector`): two processes with b samples each choose as one with 2b, while two accumulated passes of b samples
    choose twice. So do the halves of a pass that was too large: where the device has too little memory, a lone process
    goes on with half the samples per pass and twice the passes.

    Logs, averaged over all processes and since the last line: `loss_llm`, `loss_align` (without its weight), `labelled`
    (share of samples), `attention_inside` (share of the selected heads' image attention inside the labels, over
    labelled samples) and `heads_overlap` (share of the heads kept from one forward pass to the next); and of the last
    pass `query_use`, `query_entropy`, `key_use`, `key_entropy` of the experts, averaged over layers and processes,
    and `heads_selected`, a text of 0 and 1 for each layer.

    Raises `NonFiniteError` for a loss that is no number, RunError where the memory is too small for one sample.

    Args:
        model: what `add_adapter` returns, on a model that `load_vlm` returned.
        args: `remove_unused_columns` must be False; labels are not smoothed. On several GPUs start one process each
            (`accelerate launch`).
        samples: training set.
        collator: makes the batches.
        alignment: weight, heads, rows and variant.
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
        if args.label_smoothing_factor:
            raise ConfigError("label_smoothing_factor: expected 0; the answers are learnt as they are")
        one_device(args)
        # Every adapted matrix takes part in every pass: no need to search for those that do not.
        args.ddp_find_unused_parameters = False
        # L_LLM is the mean over the tokens of all processes.
        args.average_tokens_across_devices = True
        super().__init__(
            model=model,
            args=args,
            train_dataset=samples,
            data_collator=collator,
            callbacks=callbacks,
        )
        # Every supported family averages its loss over an accumulated batch; Qwen2.5-VL and Qwen3-VL deny that they do.
        self.model_accepts_loss_kwargs = True
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
        self.alignment = Alignment(alignment, model, total=self.total) if alignment.weight else None
        self.load_balance = load_balance
        active = model.active_peft_config
        self.routed = isinstance(active, A3MoEConfig) and active.routed

    def calibrate_heads(self) -> None:
        """Rank the heads by their mean visual ratio (Eq. 8) over evenly spaced training samples, for fixed heads.

        The processes share the samples and agree on the ranking. Raises ConfigError where no process holds the model.
        """
        if self.alignment is None:
            return
        model: Any = self.model
        samples: Sequence[Sample] = self.train_dataset  # pyright: ignore[reportAssignmentType]
        chosen, size = evenly_spaced(samples), self.args.per_device_train_batch_size
        starts = range(size * self.accelerator.process_index, len(chosen), size * self.accelerator.num_processes)
        batches = (self._prepare_inputs(self.collator(chosen[start : start + size])) for start in starts)
        calibrate(self.alignment, model, batches, routed=self.routed)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        if self.validation is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics = self.validation.measure(self.alignment, routed=self.routed)
        self.log({VALIDATION + name: value for name, value in metrics.items()})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_train_dataloader(self) -> Any:
        loader: Any = super().get_train_dataloader()
        # accelerate wraps the one that starts the processes.
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = Undisturbed(inner.worker_init_fn)
        return loader

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        # PEFT would copy the input of every layer to fp32, and autocast back again. Around the backward pass, too:
        # activation checkpointing replays the layers there.
        with disable_input_dtype_casting(model, active=self.accelerator.native_amp):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        losses = step_losses(
            model,
            inputs,
            self.alignment,
            tokens=num_items_in_batch,
            samples=self.samples_in_step,
            processes=self.accelerator.num_processes,
            routed=self.routed,
            load_balance=self.load_balance,
        )
        check_finite(losses, inputs["sample_ids"], self.state.global_step + 1, self.total)
        self.sums.add_losses(losses)
        return (losses.total, losses.outputs) if return_outputs else losses.total
