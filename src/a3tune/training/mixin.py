"""`step.py` in anybody's `transformers.Trainer`: the step counted, both losses, the heads in checkpoints, the log."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

from a3tune.compat.peft import disable_input_dtype_casting
from a3tune.errors import ConfigError
from a3tune.training.calibrate import calibrate, evenly_spaced
from a3tune.training.log import LoggingTrainer
from a3tune.training.nonfinite import check_finite
from a3tune.training.step import Alignment, Counts

HEADS_FILE = "heads.safetensors"
"""The scores that rank the heads, where they outlive a batch."""


class AlignmentMixin(LoggingTrainer):
    """L_LLM + weight * L_align (Eq. 12) in a Trainer: `class Mine(AlignmentMixin, SFTTrainer)`.

    Takes what the other Trainer takes, and `alignment`. The batches are those of `Alignment.collate` (or `adopt`), so
    `data_collator=alignment.collate`. The loss takes the place of that Trainer's own, and of what it makes beside it.

    L_LLM is the mean over all answer tokens and L_align (Eq. 10) that over ALL samples of an optimiser step: gradient
    accumulation and processes change nothing, and a sample without labels contributes zero.

    Heads are chosen by the samples of one forward pass on all processes together, unless they are fixed
    (`calibrate_heads` before `train`): two processes with b samples each choose as one with 2b, while two accumulated
    passes of b samples choose twice. What ranks them is kept in the checkpoints.

    Logs, averaged over all processes and since the last line: `loss_llm`, `loss_align` (without its weight), `labelled`
    (share of samples), `attention_inside` (share of the selected heads' image attention inside the labels, over
    labelled samples) and `heads_overlap` (share of the heads kept from one forward pass to the next); and of the last
    pass `query_use`, `query_entropy`, `key_use`, `key_entropy` of the experts, averaged over layers and processes,
    and `heads_selected`, a text of 0 and 1 for each layer. `eval_loss` is the same loss with the weight of the first
    step, the mean over batches.

    Raises `NonFiniteError` for a loss that is no number, ConfigError for arguments that ask for another loss, and for
    a class in which the other Trainer comes first.

    Args:
        args: columns that the model does not know are kept, whatever they say. On several GPUs start one process each
            (`accelerate launch`).
        alignment: on the model that is trained, with its adapter or before it gets one.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(AlignmentMixin)]:
            if issubclass(base, Trainer) and not issubclass(base, AlignmentMixin):
                raise ConfigError(
                    f"class {cls.__name__}: expected AlignmentMixin before {base.__name__}, whose loss would take the "
                    f"place of ours: class {cls.__name__}(AlignmentMixin, {base.__name__})"
                )

    def __init__(
        self, model: Any = None, args: TrainingArguments | None = None, *rest: Any, alignment: Alignment, **others: Any
    ) -> None:
        if not isinstance(alignment, Alignment):
            raise ConfigError(f"alignment: expected an a3tune.Alignment, got {type(alignment).__name__}")
        _check_loss(args, others)
        super().__init__(model, args, *rest, **others)
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"args: expected one GPU in a process, got {self.args.n_gpu}: the masks of a batch cannot be split. "
                "Start one process for each (`accelerate launch`), or choose one with CUDA_VISIBLE_DEVICES"
            )
        self.alignment = alignment
        self.args.remove_unused_columns = False  # the collator knows them
        # L_LLM is the mean over the tokens of all processes.
        self.args.average_tokens_across_devices = True
        # Every supported family averages its loss over an accumulated batch; Qwen2.5-VL and Qwen3-VL deny that they do.
        self.model_accepts_loss_kwargs = True

    def calibrate_heads(self) -> None:
        """Rank the heads by their mean visual ratio (Eq. 8) over evenly spaced training samples, for fixed heads.

        The processes share the samples and agree on the ranking. Raises ConfigError where no process holds the model.
        """
        model, rows = self.model, self.train_dataset
        chosen, size = evenly_spaced(len(rows)), self.args.per_device_train_batch_size  # pyright: ignore
        starts = range(size * self.accelerator.process_index, len(chosen), size * self.accelerator.num_processes)
        parts = (chosen[start : start + size] for start in starts)
        batches = (self._prepare_inputs(self.data_collator([rows[i] for i in part])) for part in parts)  # pyright: ignore
        calibrate(self.alignment, model, batches)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        # PEFT would copy the input of every layer to fp32, and autocast back again. Around the backward pass, too:
        # activation checkpointing replays the layers there.
        with disable_input_dtype_casting(model, active=self.accelerator.native_amp):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            loss, outputs = self.alignment.apart().loss(model, inputs)
            # The maps are no predictions, which an evaluation would gather.
            kept = {name: value for name, value in outputs.items() if name != "attentions"}
            return (loss, type(outputs)(**kept)) if return_outputs else loss
        self.alignment.progress = self.state.global_step / max(1, self.state.max_steps)
        counts = Counts(num_items_in_batch, self.samples_in_step, self.accelerator.num_processes)
        losses = self.alignment.losses(model, inputs, counts)
        check_finite(losses, inputs["sample_ids"], self.state.global_step + 1, self.total)
        self.sums.add_losses(losses)
        return (losses.total, losses.outputs) if return_outputs else losses.total

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and (scores := self.alignment.selector.state_dict()):
            save_file(scores, Path(output_dir or str(self.args.output_dir)) / HEADS_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and (file := Path(checkpoint) / HEADS_FILE).is_file():
            self.alignment.selector.load_state_dict(load_file(file))


def _check_loss(args: Any, others: dict[str, Any]) -> None:
    """ConfigError for what would change a loss that ours takes the place of."""
    asked = {
        "label_smoothing_factor": getattr(args, "label_smoothing_factor", 0.0),
        "compute_loss_func": others.get("compute_loss_func"),
        "loss_type": getattr(args, "loss_type", None) not in (None, "nll") and args.loss_type,
    }
    for name, value in asked.items():
        if value:
            raise ConfigError(f"{name}: expected none, the answers are learnt as they are; got {value}")
