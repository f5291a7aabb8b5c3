"""Both losses (Eq. 11-12) in a `transformers.Trainer`: scaling, logging, checkpoints, interruption.

Knows batches of `collate.py`, an adapted model and the settings of the alignment; not where they come from.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from a3tune.adapters import A3MoEConfig, Routing, balance_loss, gate_loads
from a3tune.attention.align import alignment_loss, averaged_map, labelled
from a3tune.attention.capture import Captured, capture_request, check_captured, stack
from a3tune.attention.heads import HeadSelector, overlap, votes
from a3tune.config import AlignmentConfig
from a3tune.errors import A3TuneError
from a3tune.training.collate import Collator
from a3tune.types import Sample
from a3tune.vlm.encode import TOKEN_MASKS

HEADS_FILE = "heads.safetensors"
CALIBRATION_SAMPLES = 64

_AVERAGES = {
    "loss_llm": ("loss_llm", "steps"),
    "loss_align": ("loss_align", "steps"),
    "labelled": ("labelled", "samples"),
    "attention_inside": ("inside", "labelled"),
    "heads_overlap": ("overlap", "overlaps"),
}
"""What is logged, as one sum over another."""
_SUMS = sorted({name for pair in _AVERAGES.values() for name in pair})

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """The user stopped the training; a checkpoint was saved. The message says how to go on."""


class A3Trainer(Trainer):
    """Minimises L_LLM + weight * L_align (Eq. 12) over the adapter's parameters.

    L_align (Eq. 10) is the mean over ALL samples of an optimiser step: gradient accumulation and processes change
    nothing, and a sample without labels contributes zero. Heads are chosen per forward pass and process,
    unless they are fixed (`HeadSelector`). With `alignment.weight` 0 no attention is captured.

    Logs, averaged since the last line: `loss_llm`, `loss_align` (without its weight), `labelled` (share of samples),
    `attention_inside` (share of the selected heads' image attention inside the labels, over labelled samples) and
    `heads_overlap` (share of the heads kept from one forward pass to the next); and of the last pass `query_use`,
    `query_entropy`, `key_use`, `key_entropy` of the experts, averaged over layers,
    and `heads_selected`, a text of 0 and 1 for each layer.

    Args:
        model: what `add_adapter` returns, on a model that `load_vlm` returned.
        args: `remove_unused_columns` must be False. On several GPUs start one process each (`accelerate launch`).
        samples: training set.
        collator: makes the batches.
        alignment: weight, heads, rows and variant.
        load_balance: weight of the routers' load-balance term; the adapter must then be made with `balance=True`.
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
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        # DataParallel cannot split the masks that travel as keywords.
        args._n_gpu = min(args.n_gpu, 1)
        super().__init__(
            model=model,
            args=args,
            train_dataset=samples,  # pyright: ignore[reportArgumentType]
            data_collator=collator,  # pyright: ignore[reportArgumentType]
            callbacks=callbacks,
        )
        # Every supported family averages its loss over an accumulated batch; Qwen2.5-VL and Qwen3-VL deny that they do.
        self.model_accepts_loss_kwargs = True
        for talkative in (PrinterCallback, ProgressCallback):
            self.remove_callback(talkative)
        self.collator = collator
        self.alignment = alignment
        self.load_balance = load_balance
        self.selector = HeadSelector(alignment.heads, alignment.head_selection) if alignment.weight else None
        active = model.active_peft_config
        self.routed = isinstance(active, A3MoEConfig) and active.routed
        self._checked = False
        self._samples_in_step = 0
        self._heads: Tensor | None = None
        self._averages = Averages()

    def calibrate_heads(self) -> None:
        """Rank the heads by their mean visual ratio (Eq. 8) over evenly spaced training samples, for fixed heads."""
        if self.selector is None:
            return
        model: Any = self.model
        samples: Sequence[Sample] = self.train_dataset  # pyright: ignore[reportAssignmentType]
        chosen = samples[:: max(1, len(samples) // CALIBRATION_SAMPLES)][:CALIBRATION_SAMPLES]
        size = self.args.per_device_train_batch_size
        ratios = []
        model.eval()
        for start in range(0, len(chosen), size):
            inputs, masks, _ = self._split(self._prepare_inputs(self.collator(chosen[start : start + size])))
            request = capture_request(self.alignment.rows, **masks)
            with torch.no_grad():
                outputs = model(**inputs, capture=request, output_attentions=True)
            captured = stack(outputs.attentions, request)
            ratios.append(votes(captured.ratio_BLH, captured.counted_B))
        self.selector.calibrate(torch.cat(ratios).mean(0))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        batches, items = super().get_batch_samples(*args, **kwargs)
        count = torch.tensor(sum(len(batch["sample_ids"]) for batch in batches), device=self.args.device)
        self._samples_in_step = int(self.accelerator.gather(count).sum())  # pyright: ignore[reportAttributeAccessIssue]
        self._averages.add("steps", 1)
        return batches, items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs, masks, rest = self._split(inputs)
        request = None
        if self.selector is not None:
            request = capture_request(self.alignment.rows, **masks, each_row=self.alignment.variant == "code")
            inputs |= {"capture": request, "output_attentions": True}
        if self.routed:
            inputs["routing"] = Routing(masks["prompt_mask"], masks["image_mask"])
        outputs: Any
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        self._averages.add("loss_llm", loss)
        # Each process averages its own gradients with those of the others.
        share = self.accelerator.num_processes / self._samples_in_step
        if request is not None:
            if not self._checked:
                check_captured(outputs.attentions, model)
                self._checked = True
            align = self._align(stack(outputs.attentions, request), rest["segments"]).sum() * share
            self._averages.add("loss_align", align)
            loss = loss + self.alignment.weight * align
        if self.load_balance:
            loss = loss + self.load_balance * balance_loss(model) * len(rest["sample_ids"]) * share
        if not torch.isfinite(loss):
            raise A3TuneError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()} on samples "
                f"{', '.join(rest['sample_ids'])}. Look at them; a lower training.learning_rate "
                "or a training.max_grad_norm may help."
            )
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._averages.take(self.accelerator)
            model: Any = self.model
            for kind, load in gate_loads(model).items():
                logs[f"{kind}_use"] = load.use.mean(0).tolist()  # pyright: ignore[reportArgumentType]
                logs[f"{kind}_entropy"] = load.entropy.mean().item()
            if self._heads is not None:
                logs["heads_selected"] = ["".join(map(str, row)) for row in self._heads.int().tolist()]  # pyright: ignore[reportArgumentType]
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.selector is not None and self.args.should_save and (state := self.selector.state_dict()):
            save_file(state, Path(output_dir or str(self.args.output_dir)) / HEADS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / HEADS_FILE
        if self.selector is not None and file.is_file():
            self.selector.load_state_dict(load_file(file, device=str(self.args.device)))

    def _split(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Inputs of the model, token masks, and what only the losses need."""
        masks = {name: inputs[name] for name in TOKEN_MASKS}
        rest = {name: inputs[name] for name in ("segments", "sample_ids")}
        taken = {name: value for name, value in inputs.items() if name not in masks | rest}
        return {**taken, "use_cache": False}, masks, rest

    def _align(self, captured: Captured, segments_BKN: Tensor) -> Tensor:
        """L_align of each sample, `[B]` (Eq. 8-10)."""
        assert self.selector is not None
        heads_LH = self.selector.select(captured.ratio_BLH.detach(), captured.counted_B)
        map_BN = averaged_map(captured.map_BLHN, heads_LH)
        self._averages.add("samples", len(segments_BKN))
        counted = labelled(segments_BKN) & captured.counted_B
        self._averages.add("labelled", counted.sum())
        self._averages.add("inside", _inside(map_BN.detach(), segments_BKN)[counted].sum())
        if self._heads is not None:
            self._averages.add("overlap", overlap(self._heads, heads_LH))
            self._averages.add("overlaps", 1)
        self._heads = heads_LH
        return alignment_loss(map_BN, segments_BKN, self.alignment.variant)


def _inside(map_BN: Tensor, segments_BKN: Tensor) -> Tensor:
    """Share of each sample's image attention inside the union of its segments, `[B]`."""
    if map_BN.ndim == 3:
        map_BN = map_BN.mean(1)
    union_BN = segments_BKN.amax(1) if segments_BKN.shape[1] else torch.zeros_like(map_BN)
    return (map_BN * union_BN).sum(-1) / map_BN.sum(-1).clamp_min(torch.finfo(map_BN.dtype).tiny)


class Averages:
    """Sums of what happened since the last log line, kept on the device so that adding does not wait for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = dict.fromkeys(_SUMS, 0.0)

    def add(self, name: str, value: Tensor | float) -> None:
        self._sums[name] = self._sums[name] + (value.detach() if isinstance(value, Tensor) else value)

    def take(self, accelerator: Any) -> dict[str, float]:
        """The averages over all processes, without those that nothing was counted for; starts anew."""
        sums = torch.stack(
            [torch.as_tensor(self._sums[name], dtype=torch.float32).to(accelerator.device) for name in _SUMS]
        )
        total = dict(zip(_SUMS, accelerator.reduce(sums, reduction="mean").tolist(), strict=True))
        captured = total["samples"] > 0
        self._sums = dict.fromkeys(_SUMS, 0.0)
        return {
            name: total[above] / total[below]
            for name, (above, below) in _AVERAGES.items()
            if total[below] > 0 and (captured or name == "loss_llm")
        }


class ProgressBar(ProgressCallback):
    """One line on the terminal, with the last losses at its end."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs is not None and "loss" in logs:
            shown = ("loss_llm", "loss_align", "attention_inside")
            self.training_bar.set_postfix({name: f"{logs[name]:.3g}" for name in shown if name in logs})


class StopOnRequest(TrainerCallback):
    """Ends the training after the running step, with a checkpoint, once `requested` is set."""

    def __init__(self) -> None:
        self.requested = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.requested and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control


@contextmanager
def stopping_on_interrupt(stop: StopOnRequest) -> Iterator[None]:
    """Ctrl-C requests a stop, a second one ends at once. Elsewhere than in the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous, process = signal.getsignal(signal.SIGINT), os.getpid()

    def request(*_: Any) -> None:
        if os.getpid() != process:  # a data-loading process inherited this: it goes on until it is told to end
            return
        logger.warning("interrupted: finishing this step and saving a checkpoint (Ctrl-C again to stop at once)")
        stop.requested = True
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
