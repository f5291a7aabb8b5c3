"""Both losses (Eq. 11-12) in a `transformers.Trainer`: scaling, logging, checkpoints, too little memory.

Knows batches of `collate.py`, an adapted model and the settings of the alignment; not where they come from.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from a3tune.adapters import A3MoEConfig, Routing, balance_loss, gate_loads
from a3tune.attention.align import alignment_loss, averaged_map, labelled
from a3tune.attention.capture import Captured, capture_request, check_captured, stack
from a3tune.attention.heads import HeadSelector, overlap, votes
from a3tune.config import AlignmentConfig
from a3tune.errors import AdapterError, ConfigError, RunError
from a3tune.training.averages import Averages
from a3tune.training.checkpoint import saving
from a3tune.training.collate import Collator
from a3tune.types import Sample
from a3tune.vlm.encode import TOKEN_MASKS

HEADS_FILE = "heads.safetensors"
STEP_FILE = "step.json"
"""File of a checkpoint: how many samples an optimiser step takes, whatever the number of processes."""
CALIBRATION_SAMPLES = 64
IGNORED = -100
"""Label of a token that is not learnt."""

logger = logging.getLogger(__name__)


class NonFiniteError(RunError):
    """A loss is NaN or infinite. Every process raises it in the same forward pass."""

    def __init__(self, step: int, batches: list[dict[str, Any]]) -> None:
        self.step = step
        self.batches = batches
        """One per process: `samples`, their ids, and the losses by name."""
        broken = [batch for batch in batches if batch["broken"]]
        super().__init__(
            f"step {step}: the loss is {broken[0]['loss']} on samples "
            f"{', '.join(name for batch in broken for name in batch['samples'])}. Look at them; a lower "
            "training.learning_rate or a training.max_grad_norm may help"
        )


class A3Trainer(Trainer):
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
        # Every adapted matrix takes part in every pass: no need to search for those that do not.
        args.ddp_find_unused_parameters = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=samples,  # pyright: ignore[reportArgumentType]
            data_collator=collator,  # pyright: ignore[reportArgumentType]
            callbacks=callbacks,
        )
        # Every supported family averages its loss over an accumulated batch; Qwen2.5-VL and Qwen3-VL deny that they do.
        self.model_accepts_loss_kwargs = True
        if self.is_fsdp_enabled:
            # transformers' own list names layers of towers that this model may not have.
            layer: Any = model.get_base_model().get_decoder().layers[0]  # pyright: ignore
            plugin: Any = self.accelerator.state.fsdp_plugin
            plugin.transformer_cls_names_to_wrap = [type(layer).__name__]
        for talkative in (PrinterCallback, ProgressCallback):
            self.remove_callback(talkative)
        self.collator = collator
        self.alignment = alignment
        self.load_balance = load_balance
        selector = HeadSelector(alignment.heads, alignment.head_selection, total=self._total)
        self.selector = selector if alignment.weight else None
        active = model.active_peft_config
        self.routed = isinstance(active, A3MoEConfig) and active.routed
        self._checked = False
        self._samples_in_step = 0
        self._heads: Tensor | None = None
        self._averages = Averages()
        self._largest = args.per_device_train_batch_size
        """Samples of a forward pass that the memory is known or hoped to hold."""
        self._begun: list[dict[str, Any]] = []
        """Batches of the running step that were begun."""

    @property
    def alone(self) -> bool:
        """Whether no other process waits for this one."""
        return self.accelerator.distributed_type == DistributedType.NO

    @property
    def samples_per_step(self) -> int:
        """Of an optimiser step, over all processes."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes

    def calibrate_heads(self) -> None:
        """Rank the heads by their mean visual ratio (Eq. 8) over evenly spaced training samples, for fixed heads.

        The processes share the samples and agree on the ranking. Raises ConfigError where no process holds the model.
        """
        if self.selector is None:
            return
        if is_deepspeed_zero3_enabled():
            raise ConfigError(
                "alignment.head_selection: fixed ranks the heads before the training, when ZeRO-3 has shared out the "
                "model already; use batch, running or another recipe"
            )
        model: Any = self.model
        samples: Sequence[Sample] = self.train_dataset  # pyright: ignore[reportAssignmentType]
        chosen = samples[:: max(1, len(samples) // CALIBRATION_SAMPLES)][:CALIBRATION_SAMPLES]
        size = self.args.per_device_train_batch_size
        # Of another process every share may be empty: its votes still need the shape.
        text = model.config.get_text_config()
        ratios = [torch.zeros(0, text.num_hidden_layers, text.num_attention_heads, device=self.args.device)]
        model.eval()
        for start in range(size * self.accelerator.process_index, len(chosen), size * self.accelerator.num_processes):
            inputs, masks, _ = self._split(self._prepare_inputs(self.collator(chosen[start : start + size])))
            request = capture_request(self.alignment.rows, **masks)
            with torch.no_grad():
                outputs = model(**inputs, capture=request, output_attentions=True)
            captured = stack(outputs.attentions, request)
            ratios.append(votes(captured.ratio_BLH, captured.counted_B))
        self.selector.calibrate(self.selector.mean_vote(torch.cat(ratios)))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        batches, items = super().get_batch_samples(*args, **kwargs)
        count = sum(_counted(batch).sum() for batch in batches)
        self._samples_in_step = int(self._total(torch.as_tensor(count, device=self.args.device)))
        self._averages.add("steps", 1)
        self._begun, self._before = [], self._bookkeeping()
        return batches, items

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        # accelerate fills up the last batches of an epoch with samples of its beginning, so that every process has as
        # many. A sample without a token to learn counts for nothing (`_counted`), here as in both losses and all logs.
        size, processes = self.args.per_device_train_batch_size, self.accelerator.num_processes
        left = len(self.train_dataset) % (size * processes)  # pyright: ignore[reportArgumentType]
        if processes > 1 and left and self.accelerator.gradient_state.end_of_dataloader:
            own = min(max(left - size * self.accelerator.process_index, 0), size)
            batch_samples[-1]["labels"][own:] = IGNORED
            batch_samples[-1]["segments"][own:] = 0
        return super()._get_num_items_in_batch(batch_samples, device)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's, but in smaller passes where the device has too little memory for the whole.

        Both losses are sums over samples and tokens, divided by those of the whole step, so passes of any size add up
        to the same gradient. What the failed pass left behind is unknown: the step starts again.
        """
        self._begun.append(inputs)
        waiting = [inputs]
        while True:
            try:
                for batch in waiting:
                    loss = self._in_passes(model, batch, num_items_in_batch)
                return loss  # pyright: ignore[reportPossiblyUnboundVariable]
            except torch.OutOfMemoryError as error:
                self._halve(inputs["sample_ids"], error)
            # Only out here has the traceback let go of the pass's activations.
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            model.zero_grad()
            self._go_back(self._before)
            waiting = self._begun

    def _in_passes(self, model: Any, batch: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        ids = batch["sample_ids"]
        if len(ids) <= self._largest:
            return super().training_step(model, batch, num_items_in_batch)
        total = torch.zeros((), device=self.args.device)
        for start in range(0, len(ids), self._largest):
            # Made anew: how a batch is cut differs between model families.
            part = self.collator([self._by_id[name] for name in ids[start : start + self._largest]])
            total += super().training_step(model, part, num_items_in_batch)
        return total

    @cached_property
    def _by_id(self) -> dict[str, Sample]:
        dataset: Any = self.train_dataset
        return {sample.id: sample for sample in dataset}

    def _halve(self, ids: list[str], error: Exception) -> None:
        """Smaller passes from now on. Raises RunError where that cannot be."""
        size, failed = self.args.per_device_train_batch_size, min(len(ids), self._largest)
        if not self.alone and failed > 1:
            # The others wait for this process within the very pass that failed.
            half = 1 if size % 2 else size // 2
            raise RunError(
                f"step {self.state.global_step + 1}: a device has too little memory for {size} samples at once. Use "
                f"training.batch_size={half} and {size // half} times the training.accumulation: the run goes on from "
                "its last checkpoint with the same samples per step"
            ) from error
        if failed == 1:
            raise RunError(
                f"step {self.state.global_step + 1}: the device has too little memory for one sample "
                f"({', '.join(ids)}); training.activation_checkpointing, model.quantization or a smaller image may help"
            ) from error
        self._largest = (failed + 1) // 2
        logger.warning(
            "too little memory for %d samples at once: going on with %d, in more passes for the same effective batch; "
            "training.batch_size=%d with a larger training.accumulation saves making batches twice",
            failed,
            self._largest,
            self._largest,
        )

    def _bookkeeping(self) -> tuple[Any, ...]:
        return self._averages.copy(), self._heads, self.selector.state_dict() if self.selector else {}

    def _go_back(self, before: tuple[Any, ...]) -> None:
        """To the start of the step, as far as passes leave traces outside of the gradients."""
        averages, self._heads, scores = before
        self._averages = averages.copy()
        if self.selector is not None:
            self.selector.load_state_dict(scores)
        with suppress(AdapterError):  # nothing to take out
            balance_loss(self.model)  # pyright: ignore[reportArgumentType]

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
        # PEFT would copy the input of every layer to fp32, and autocast back again.
        with disable_input_dtype_casting(model, active=self.accelerator.native_amp):
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        losses = {"loss_llm": loss.detach()}
        # Each process averages its own gradients with those of the others.
        share = self.accelerator.num_processes / self._samples_in_step
        if request is not None:
            if not self._checked:
                check_captured(outputs.attentions, model)
                self._checked = True
            align = self._align(stack(outputs.attentions, request), rest["segments"], rest["counted"]).sum() * share
            losses["loss_align"] = align.detach()
            loss = loss + self.alignment.weight * align
        if self.load_balance:
            loss = loss + self.load_balance * balance_loss(model) * rest["counted"].sum() * share
        self._check_finite(losses | {"loss": loss.detach()}, rest["sample_ids"])
        for name, value in losses.items():
            self._averages.add(name, value)
        return (loss, outputs) if return_outputs else loss

    def _total(self, own: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(own)  # pyright: ignore[reportReturnType]

    def _check_finite(self, losses: dict[str, Tensor], ids: list[str]) -> None:
        broken = ~losses["loss"].isfinite()
        # The others learn of it here, before they wait for gradients that will not come.
        if self._total(broken.float()) > 0:
            values = {name: float(value) for name, value in losses.items()}
            raise NonFiniteError(
                self.state.global_step + 1, gather_object([{"samples": ids, "broken": bool(broken), **values}])
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._averages.take(self.accelerator)
            model: Any = self.model
            for kind, load in gate_loads(model).items():
                use, entropy = (self.accelerator.reduce(x.mean(0), "mean") for x in (load.use, load.entropy))
                logs |= {f"{kind}_use": use.tolist(), f"{kind}_entropy": entropy.item()}  # pyright: ignore
            if self._heads is not None:
                logs["heads_selected"] = ["".join(map(str, row)) for row in self._heads.int().tolist()]  # pyright: ignore[reportArgumentType]
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with saving(self.args, self.state.global_step):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STEP_FILE).write_text(json.dumps({"samples": self.samples_per_step}))
        if self.selector is not None and (state := self.selector.state_dict()):
            save_file(state, folder / HEADS_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.selector is not None and checkpoint and (file := Path(checkpoint) / HEADS_FILE).is_file():
            self.selector.load_state_dict(load_file(file))

    def _split(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Inputs of the model, token masks, and what only the losses need."""
        masks = {name: inputs[name] for name in TOKEN_MASKS}
        rest = {name: inputs[name] for name in ("segments", "sample_ids")}
        counted = _counted(inputs)
        taken = {name: value for name, value in inputs.items() if name not in masks | rest}
        return {**taken, "use_cache": False}, masks, rest | {"counted": counted}

    def _align(self, captured: Captured, segments_BKN: Tensor, counted_B: Tensor) -> Tensor:
        """L_align of each sample, `[B]` (Eq. 8-10)."""
        assert self.selector is not None
        heads_LH = self.selector.select(captured.ratio_BLH.detach(), captured.counted_B & counted_B)
        map_BN = averaged_map(captured.map_BLHN, heads_LH)
        self._averages.add("samples", counted_B.sum())
        counted = labelled(segments_BKN) & captured.counted_B
        self._averages.add("labelled", counted.sum())
        self._averages.add("inside", _inside(map_BN.detach(), segments_BKN)[counted].sum())
        if self._heads is not None:
            self._averages.add("overlap", overlap(self._heads, heads_LH))
            self._averages.add("overlaps", 1)
        self._heads = heads_LH
        return alignment_loss(map_BN, segments_BKN, self.alignment.variant)


def _counted(batch: dict[str, Any]) -> Tensor:
    """Which samples have a token to learn, bool `[B]`: all but those that only fill up the last batch of an epoch."""
    return batch["labels"].ne(IGNORED).any(1)


def _inside(map_BN: Tensor, segments_BKN: Tensor) -> Tensor:
    """Share of each sample's image attention inside the union of its segments, `[B]`."""
    if map_BN.ndim == 3:
        map_BN = map_BN.mean(1)
    union_BN = segments_BKN.amax(1) if segments_BKN.shape[1] else torch.zeros_like(map_BN)
    return (map_BN * union_BN).sum(-1) / map_BN.sum(-1).clamp_min(torch.finfo(map_BN.dtype).tiny)


class ProgressBar(ProgressCallback):
    """One line on the terminal, with the last losses at its end."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs is not None and "loss" in logs:
            shown = ("loss_llm", "loss_align", "attention_inside")
            self.training_bar.set_postfix({name: f"{logs[name]:.3g}" for name in shown if name in logs})
