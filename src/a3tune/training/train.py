"""One run: configuration -> adapter, in a run folder. Knows the order of things; every step is another room's."""

import json
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainingArguments, set_seed

from a3tune.adapters import add_adapter
from a3tune.config import RunConfig
from a3tune.data.rows import read_rows
from a3tune.errors import ConfigError, RunError
from a3tune.files import write_atomic
from a3tune.labels.store import LabelStore, truth_labels
from a3tune.run import RunFolder
from a3tune.training.collate import Collator, LabelsFor
from a3tune.training.trainer import A3Trainer, Interrupted, ProgressBar, StopOnRequest, stopping_on_interrupt
from a3tune.vlm.load import load_vlm
from a3tune.vlm.quantize import is_quantized, prepare_for_training

HARMLESS = {
    "model.device",
    "data.validation",
    "data.test",
    "training.save_steps",
    "training.log_steps",
    "training.workers",
}
"""Settings that a run may go on with when they change: they do not touch what is learnt."""

logger = logging.getLogger(__name__)


def train(config: RunConfig, *, callbacks: Sequence[TrainerCallback] | None = None) -> Path:
    """Train an adapter; leave it in the run folder `config.output`, with configuration, environment and metrics.

    A run that was stopped goes on from its last checkpoint, to the same weights as without the stop; one that is done
    is left alone. Returns the run folder. `callbacks` take the place of the progress bar.

    Raises `Interrupted` after Ctrl-C, and the errors of `a3tune.errors` for what a user can mend; `RunError` when the
    folder belongs to a run with other settings or cannot be written.
    """
    args = training_arguments(config)
    with args.main_process_first(local=False):
        folder = RunFolder.create(config.output)
    with folder.lock() if args.process_index == 0 else nullcontext():
        _refuse_other_settings(folder, config)
        if folder.adapter.is_dir():
            return folder.path
        trainer, stop = _prepare(config, args, folder, [ProgressBar()] if callbacks is None else list(callbacks))
        if args.process_index == 0:
            folder.write_config(config)
            folder.write_environment()
        try:
            _run(trainer, stop, last_checkpoint(folder.checkpoints))
            if stop.requested and trainer.state.global_step < trainer.state.max_steps:
                raise Interrupted(
                    f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; "
                    f"the same command with output={folder.path} goes on from there"
                )
            if args.process_index == 0:
                _save_adapter(trainer.model, config.model.path, folder)  # pyright: ignore[reportArgumentType]
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{folder.path}: cannot be written: {error}; make room and run the same command again"
            ) from error
    return folder.path


def training_arguments(config: RunConfig) -> TrainingArguments:
    """What `config.training` means to `transformers.Trainer`.

    Raises `ConfigError` for a device that training cannot choose.
    """
    device, settings = config.model.device, config.training
    if ":" in device:
        raise ConfigError(
            f"model.device: training takes cuda, mps, cpu or auto, got {device}; choose with CUDA_VISIBLE_DEVICES"
        )
    use_cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())
    has_bf16 = not use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return TrainingArguments(
        output_dir=str(RunFolder(config.output).checkpoints),
        use_cpu=use_cpu,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=min(settings.warmup, math.nextafter(1, 0)),  # below 1 it is a share of all steps
        lr_scheduler_type=settings.scheduler,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=has_bf16 if settings.bf16 == "auto" else settings.bf16,
        seed=settings.seed,
        save_steps=settings.save_steps,
        save_total_limit=1,
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,
        dataloader_num_workers=settings.workers,
        dataloader_persistent_workers=settings.workers > 0,
        dataloader_pin_memory=not use_cpu and torch.cuda.is_available(),
        activation_checkpointing=settings.activation_checkpointing,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; its state file is written last, so one without it was cut short."""
    complete = {step: path for path in folder.glob("checkpoint-*") if (step := _state(path).get("global_step"))}
    return complete[max(complete)] if complete else None


def label_source(config: RunConfig) -> LabelsFor:
    """What `config.labels` means to the collator. Raises `LabelError` when weak labels were not made yet."""
    labels = config.labels
    if labels.source == "truth":
        return truth_labels
    if labels.source == "none":
        return lambda sample, height, width: None
    store = LabelStore(labels.store or config.output / "labels")
    return lambda sample, height, width: store.labels(sample, labels.top_k, labels.threshold)


class MetricsFile(TrainerCallback):
    """Appends every log line to `metrics.jsonl`: one JSON object with `step`, `epoch` and what `A3Trainer` logs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.path.is_file():
            # What was logged after the checkpoint comes again.
            kept = [
                line for line in self.path.read_text().splitlines(keepends=True) if _step(line) <= state.global_step
            ]
            write_atomic(self.path, "".join(kept).encode())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in logs.items()
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **finite}) + "\n")


def _refuse_other_settings(folder: RunFolder, config: RunConfig) -> None:
    """An adapter whose steps were made with different settings would be neither's."""
    if not folder.config.is_file():
        return
    earlier = folder.read_config()
    for section in ("model", "data", "labels", "adapter", "alignment", "training"):
        old, new = asdict(getattr(earlier, section)), asdict(getattr(config, section))
        for name in old:
            if old[name] != new[name] and f"{section}.{name}" not in HARMLESS:
                raise RunError(
                    f"{folder.path}: holds a run with other settings: {section}.{name} was {old[name]}, "
                    f"now {new[name]}. Choose another output, or give the settings of its config.yaml to go on with it."
                )


def _prepare(
    config: RunConfig, args: TrainingArguments, folder: RunFolder, callbacks: list[TrainerCallback]
) -> tuple[A3Trainer, StopOnRequest]:
    if config.data.train is None:
        raise ConfigError("data.train: expected a JSONL file to train on, got none")
    samples = read_rows(config.data.train)
    labels_for = label_source(config)
    device = "auto" if config.model.device_map else str(args.device)
    vlm = load_vlm(**asdict(replace(config.model, device=device)))
    if is_quantized(vlm.model):
        prepare_for_training(vlm.model)
    set_seed(config.training.seed)
    settings = config.adapter
    model = add_adapter(
        vlm.model,
        settings.kind,
        lora_rank=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        expert_rank=settings.expert_rank,
        expert_alpha=settings.expert_alpha,
        query_experts=settings.query_experts,
        key_experts=settings.key_experts,
        top_experts=settings.top_experts,
        balance=config.training.load_balance > 0,
        router_hidden=settings.router_hidden,
        control_ids=vlm.control_ids,
    )
    stop = StopOnRequest()
    trainer = A3Trainer(
        model,
        args,
        samples,
        Collator(vlm, labels_for, membership=config.alignment.membership),
        alignment=replace(config.alignment, weight=0.0) if config.labels.source == "none" else config.alignment,
        load_balance=config.training.load_balance,
        callbacks=[stop, MetricsFile(folder.metrics), *callbacks],
    )
    return trainer, stop


def _run(trainer: A3Trainer, stop: StopOnRequest, checkpoint: Path | None) -> None:
    if checkpoint is None:
        if trainer.alignment.head_selection == "fixed":
            trainer.calibrate_heads()
    elif (state := _state(checkpoint))["global_step"] >= state["max_steps"]:
        # Killed after its last step: the Trainer would take one more.
        trainer._load_from_checkpoint(str(checkpoint))
        return
    else:
        logger.info("going on from %s", checkpoint)
    with stopping_on_interrupt(stop):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _save_adapter(model: PeftModel, base: str, folder: RunFolder) -> None:
    """Save under another name first: a folder called `adapter` is always whole."""
    for adapter_config in model.peft_config.values():
        adapter_config.base_model_name_or_path = base
    unfinished = folder.adapter.with_name(".adapter.tmp")
    model.save_pretrained(str(unfinished), save_embedding_layers=False)
    unfinished.rename(folder.adapter)


def _state(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return {}


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # cut short when the run was killed
        return math.inf
