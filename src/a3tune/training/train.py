"""One run: configuration -> adapter, in a run folder. Knows the order of things; every step is another room's."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainingArguments, set_seed

from a3tune.adapters import add_adapter
from a3tune.bases import hub_name
from a3tune.config import RunConfig
from a3tune.data.rows import read_split
from a3tune.errors import A3TuneError, ConfigError, RunError
from a3tune.machine.files import remove
from a3tune.models import base_hashes, choose_device
from a3tune.run.folder import RunFolder
from a3tune.training.best import BestAdapter, save_adapter
from a3tune.training.checkpoint import check_checkpoint, delete_others, last_checkpoint, state_of
from a3tune.training.collate import Collator, RegionSource
from a3tune.training.identity import identity_of, record, refuse_other_content
from a3tune.training.interrupt import Interrupted, StopOnRequest, stopping_on_interrupt
from a3tune.training.log import MetricsFile, ProgressBar
from a3tune.training.nonfinite import NonFiniteError
from a3tune.training.regions import known_labels, label_store, region_source
from a3tune.training.resume import accumulation, is_finished, refuse_other_settings
from a3tune.training.score import validation_sample
from a3tune.training.tracking import make_trackers
from a3tune.training.trainer import A3Trainer
from a3tune.training.validation import EveryFewSteps, Validation
from a3tune.types import Sample
from a3tune.vlm.load import load_vlm
from a3tune.vlm.quantize import is_quantized, prepare_for_training

logger = logging.getLogger(__name__)


def train(config: RunConfig, *, callbacks: Sequence[TrainerCallback] | None = None) -> Path:
    """Train an adapter; leave it in the run folder `config.output`, with configuration, environment and metrics.

    A run that was stopped goes on from its last checkpoint, to the same weights as without the stop; one that is done
    is left alone. It may go on with another number of processes: an optimiser step keeps its samples and their order,
    so accumulation changes; only the random numbers of dropout are others. Returns the run folder, which all processes
    must see. `callbacks` take the place of the progress bar.

    Raises `Interrupted` after Ctrl-C, SIGTERM or SIGHUP, and the errors of `a3tune.errors` for what a user can mend;
    `RunError` when the folder belongs to a run with other settings, rows, labels or base, or cannot be written, a loss
    is not finite (`nonfinite.json` says on which samples), a data-loading process died, or the memory is too small.
    """
    args = training_arguments(config)
    with args.main_process_first(local=False):
        folder = RunFolder.create(config.output)
    with folder.lock() if args.process_index == 0 else nullcontext():
        checkpoint = last_checkpoint(folder.checkpoints)
        finished = is_finished(folder)
        started = checkpoint is not None or finished
        if started:
            refuse_other_settings(folder, config)
        samples, labels, measured = read_split(config.data, "train"), label_store(config), validation_sample(config)
        known = known_labels(config, labels, measured)
        identity = identity_of(config, samples, labels, measured, known) if args.process_index == 0 else None
        if started and identity is not None:
            refuse_other_content(folder, identity, samples)
        if finished:
            return folder.path
        if checkpoint is not None:
            check_checkpoint(checkpoint)
            args.gradient_accumulation_steps = accumulation(config, args.world_size, checkpoint)
        shown: list[TrainerCallback] = [ProgressBar()] if callbacks is None else list(callbacks)
        if args.process_index == 0:
            _say_what_is_not_measured(config, measured, known)
            if not started:
                remove(folder.best)  # of a run that stopped before its first checkpoint: of other settings, maybe
        best = _best_adapter(config, folder)
        trainer, stop = _prepare(
            config,
            args,
            folder,
            samples,
            measured,
            (region_source(config, labels), region_source(config, labels, known)),
            shown if best is None else [best, *shown],
        )
        if identity is not None:
            # The files of a model on the Hub are there once it was loaded.
            identity = replace(identity, base=base_hashes(config.model.path))
            if started:
                refuse_other_content(folder, identity, samples)
            folder.write_config(config)
            folder.write_environment(hub_name(config.model.path))
            record(folder, identity, started=started)
        pictures = trainer.validation.pictures if trainer.validation else list
        step = state_of(checkpoint)["global_step"] if checkpoint else 0
        for tracker in make_trackers(config.training.report_to, folder, step, pictures, first=args.process_index == 0):
            trainer.add_callback(tracker)
        with _explaining(folder, trainer, stop):
            weights = _learn(trainer, stop, best, checkpoint)
            if args.process_index == 0:
                save_adapter(trainer.accelerator.unwrap_model(trainer.model), weights, config.model.path, folder)
            trainer.accelerator.wait_for_everyone()
        if stop.requested:  # in the last step: what comes after a training is not begun
            raise Interrupted(number=stop.number)
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
    use_cpu = choose_device(device).type == "cpu"
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
        run_name=config.output.name,
        report_to="none",  # `tracking` tells them
        disable_tqdm=True,
    )


def _say_what_is_not_measured(config: RunConfig, measured: Sequence[Sample], known: Mapping[str, str]) -> None:
    if config.data.validation is not None and not config.training.eval_steps:
        logger.warning(
            "data.validation: %s is not used, because training.eval_steps is 0; training.eval_steps=100 measures the "
            "model on it every 100 steps",
            config.data.validation,
        )
    if measured and config.labels.source == "weak" and len(known) < len(measured):
        logger.warning(
            "%d of the %d validation rows that are evaluated have no labels in %s: they count as rows without a region "
            "in loss_align; `a3tune label %s --out %s` makes them",
            len(measured) - len(known),
            len(measured),
            config.label_store,
            config.data.validation,
            config.label_store,
        )


@contextmanager
def _explaining(folder: RunFolder, trainer: A3Trainer, stop: StopOnRequest) -> Iterator[None]:
    """What may end a training, as what a user can do about it."""
    try:
        yield
    except NonFiniteError as error:
        if trainer.args.process_index == 0:
            # JSON knows no NaN.
            batches = [{name: str(x) if isinstance(x, float) else x for name, x in b.items()} for b in error.batches]
            folder.write_json(folder.nonfinite.name, {"step": error.step, "processes": batches})
        trainer.accelerator.wait_for_everyone()
        raise RunError(f"{error}; {folder.nonfinite} holds all of them") from error
    except A3TuneError as error:
        # torch writes the traceback of a data-loading process into the message.
        _, *told = str(error).strip().rsplit(f"{type(error).__name__}: ", 1)
        if not told:
            raise
        raise type(error)(told[0]) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        if "DataLoader worker" in str(error) and stop.requested:
            # It had just been started, and did not know yet that signals are for this process.
            raise Interrupted(
                "stopped within a step; the same command goes on from the last checkpoint", stop.number
            ) from error
        if "DataLoader worker" in str(error):
            raise RunError(
                f"a data-loading process died: {error} It may have had too little memory or shared memory: lower "
                "training.workers (0 loads in the main process); the same command goes on from the last checkpoint"
            ) from error
        if isinstance(error, RuntimeError):
            raise
        raise RunError(
            f"{folder.path}: cannot be written: {error}; make room and run the same command again"
        ) from error


def _prepare(
    config: RunConfig,
    args: TrainingArguments,
    folder: RunFolder,
    samples: Sequence[Sample],
    measured: Sequence[Sample],
    regions_for: tuple[RegionSource, RegionSource],
    callbacks: list[TrainerCallback],
) -> tuple[A3Trainer, StopOnRequest]:
    """`regions_for` tells where to look in `samples` and in those that are `measured`."""
    device = "auto" if config.model.device_map else str(args.device)
    vlm = load_vlm(**asdict(replace(config.model, device=device)))
    if is_quantized(vlm.model):
        prepare_for_training(vlm.model)
    set_seed(config.training.seed)
    model = add_adapter(
        vlm.model,
        config.adapter,
        balance=config.active_balance > 0,
        control_ids=vlm.control_ids,
        layout_ids=vlm.layout_ids,
    )
    stop, settings = StopOnRequest(), config.training
    learnt, seen = (Collator(vlm, source, membership=config.alignment.membership) for source in regions_for)
    validation = None
    if measured:
        evaluation = {"batch_size": settings.batch_size, "also": settings.keep_best}
        validation = Validation(replace(vlm, model=model), measured, seen, config.active_evaluation, **evaluation)
        callbacks = [EveryFewSteps(settings.eval_steps), *callbacks]
    trainer = A3Trainer(
        model,
        args,
        samples,
        learnt,
        alignment=config.active_alignment,
        load_balance=config.active_balance,
        validation=validation,
        callbacks=[stop, MetricsFile(folder.metrics), *callbacks],
    )
    return trainer, stop


def _best_adapter(config: RunConfig, folder: RunFolder) -> BestAdapter | None:
    settings = config.training
    if settings.keep_best is None:
        return None
    return BestAdapter(folder, settings.keep_best, settings.eval_steps, settings.patience, config.model.path)


def _learn(
    trainer: A3Trainer, stop: StopOnRequest, best: BestAdapter | None, checkpoint: Path | None
) -> dict[str, Any] | None:
    """To the last step. Returns the model's weights, also if the processes share them out; None: as they are in it."""
    if checkpoint is not None and _is_over(state_of(checkpoint), best):
        # Killed after its last step: the Trainer would take one more.
        model: Any = trainer.model
        model.load_adapter(str(checkpoint), model.active_adapter)
        if trainer.args.should_save:
            delete_others(checkpoint)
        return None
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    elif trainer.alignment.config.weight and trainer.alignment.selector.mode == "fixed":
        trainer.calibrate_heads()
    with stopping_on_interrupt(stop, processes=trainer.args.world_size):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # A process that ended before the checkpoint is whole would end the others, too.
    trainer.accelerator.wait_for_everyone()
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; "
            "the same command goes on from there",
            stop.number,
        )
    if best is not None and best.gave_up(trainer.state.global_step):
        logger.warning("%s", best.reason(trainer.state.global_step, trainer.state.max_steps))
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


def _is_over(state: Mapping[str, Any], best: BestAdapter | None) -> bool:
    """Whether a checkpoint is that of the last step: of all, or of those before a run got no better."""
    step = state["global_step"]
    return step >= state["max_steps"] or (best is not None and best.gave_up(step))
