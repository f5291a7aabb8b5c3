"""Samples + model -> answers, attention maps, results. Resumable: what is answered is not asked again.

Knows the order of things; how answers and maps are scored is the business of `metrics`, their means that of `results`.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from a3tune.config import AlignmentConfig, EvaluationConfig, LabelsConfig
from a3tune.decoding import check_decoder, make_decoder
from a3tune.errors import DataError
from a3tune.evaluation.ahead import Ahead, read_ahead
from a3tune.evaluation.answer import attention_scores
from a3tune.evaluation.asking import Read, answers, attend, batches, evaluation_mode, in_memory, read, with_answers
from a3tune.evaluation.identity import EvaluationIdentity, identity_of, record, refuse_other
from a3tune.evaluation.predictions import Cost, Map, PredictionLog
from a3tune.evaluation.regions import region_finder
from a3tune.evaluation.reliance import Occluder, whole_image
from a3tune.evaluation.reliance_log import RelianceLog, read_reliance, with_reliance
from a3tune.evaluation.results import Results, make_prediction, summarise
from a3tune.machine import processes
from a3tune.metrics.catalogue import ALL_HEADS
from a3tune.metrics.radiology import radiology_scores
from a3tune.run.folder import RunFolder
from a3tune.types import Prediction, Sample
from a3tune.vlm.load import Vlm
from a3tune.vlm.look import answer_text

NO_REGION = "no question has a region to measure on; `a3tune data regions` gives masks to rows"
R = TypeVar("R")
T = TypeVar("T")
DECISIVE = ("heads", "rows", "tau", "normalisation", "max_new_tokens", "decode", "decoding", "strategy", "seed")
"""Settings that answers and their attention depend on: an evaluation goes on only with the same."""


def evaluate(
    vlm: Vlm,
    samples: Sequence[Sample],
    settings: EvaluationConfig | None = None,
    *,
    labels: LabelsConfig | None = None,
    out_folder: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Results:
    """Answer every sample; score the answers, and the attention wherever the true region is known.

    Attention is that of the text rows `settings.rows`, averaged over the heads with the highest visual ratio of that
    sample alone (Eq. 8-9), so that no sample depends on its batch. The same over all heads (Eq. 2) ends in `ALL_HEADS`.

    With `settings.occlude` all questions are asked again with parts of the images hidden (`evaluation.reliance`).

    Several processes (`processes`) share the batches, to the same answers as one process alone; the first one writes
    the folder. Report metrics are computed and returned there only.

    Args:
        vlm: a model whose attention can be captured (`load_vlm`), with or without an adapter.
        settings: how to answer and what to score; None is the defaults. `heads` and `rows` that are None are those
            of `AlignmentConfig`; of a run take its `RunConfig.active_evaluation`. A batch is halved where the device
            has too little memory for it. Its random numbers start from the seed and its first sample's id: they differ
            between batches, and the answers do not depend on interruptions.
        labels: how the regions to hide are found where no sample has its own; None is the defaults. Of a run take its
            `RunConfig.labels`.
        out_folder: run folder for `predictions.jsonl`, `maps/`, `reliance.jsonl` and `results.json`; a stopped
            evaluation goes on in it.
        progress: called with the number of samples answered, and of all, after every batch; who is asked again with
            parts of the image hidden counts twice.

    Raises:
        ConfigError, ModelError: no such decoding method, or the model lacks what it needs.
        DataError, LabelError: a sample cannot be used, the message names it; or there is no region to hide.
        RunError: the folder is not ours, in use, or holds an evaluation of other samples, weights or settings.
    """
    by_id = {sample.id: sample for sample in samples}
    if len(by_id) != len(samples):
        raise DataError(f"samples: expected a different id for each of the {len(samples)}, got only {len(by_id)} ids")
    settings = (settings or EvaluationConfig()).over(AlignmentConfig())
    decoder = make_decoder(settings.decode, settings.decoding)
    check_decoder(decoder, vlm, regions_known=all(one.regions for one in samples), strategy=settings.strategy)
    finder = region_finder(samples, labels or LabelsConfig(), str(vlm.device)) if settings.occlude else None
    total = len(samples) * (2 if finder else 1)
    first = processes.index() == 0
    folder = RunFolder.create(out_folder) if out_folder and first else None
    with folder.lock() if folder else nullcontext(), evaluation_mode(vlm):
        about = {name: getattr(settings, name) for name in DECISIVE}
        answered_by: dict[str, Any] = {}
        if folder:
            identity = identity_of(vlm, samples, about)
            _identify(folder, identity)
            answered_by = {"weights": identity.weights, "settings": about}
        book = PredictionLog(folder, by_id)
        book.take_over(*processes.from_first((book.predictions, book.maps, book.cost)))
        work = list(batches(vlm, samples, settings.batch_size))
        for pieces in _asked(partial(_answer, vlm, settings=settings), partial(read, vlm), work, book.predictions):
            for answered in pieces:
                book.add(*answered)
            progress(len(book.predictions), total)
        reports = [sample for sample in samples if sample.answer_type == "report"]
        absent = _score_reports(book, reports, settings) if first else {}
        hiding, occluded = processes.from_first(read_reliance(folder) if folder else (None, {}))
        if finder:
            occluder = Occluder(vlm, settings, finder, book.predictions, book.maps)
            hiding = occluder.hiding()
            log = RelianceLog(folder, hiding, answered_by)
            occluded = log.records = processes.from_first(log.records)
            for pieces in _asked(occluder, whole_image, work, log.records):
                log.add([record for records in pieces for record in records])
                progress(len(book.predictions) + len(log.records), total)
        measured = {"model": vlm.name} | about | ({"occlusion": asdict(hiding)} if hiding else {})
        predictions = with_reliance([book.predictions[sample.id] for sample in samples], occluded)
        results = summarise(samples, predictions, maps=book.maps, settings=measured, cost=book.cost)
        if not results.counts["with_attention"]:
            absent = {**absent, "attention": NO_REGION}
        results = replace(results, absent=absent)
        if folder:
            folder.write_json(folder.results.name, results.as_json())
    return results


def _asked(
    ask: Callable[[Sequence[Ahead[T]]], R],
    read: Callable[[Sample], T],
    work: Sequence[Sequence[Sample]],
    done: Collection[str],
) -> Iterator[list[R]]:
    """What `ask` makes of the batches that are not done, shared among the processes; `read` reads them ahead.

    A batch is asked whole or not at all: the numbers do not depend on where an evaluation was stopped.
    """
    waiting = [batch for batch in work if any(sample.id not in done for sample in batch)]
    own = waiting[processes.index() :: processes.count()]
    with read_ahead(read, own) as ahead:
        for _ in range(0, len(waiting), processes.count()):
            # In the last round a process may have none.
            yield from processes.gather([in_memory(ask, batch) for batch in islice(ahead, 1)])


def _identify(folder: RunFolder, identity: EvaluationIdentity) -> None:
    """Say what answers belong to before there are any, and refuse to go on with those of something else.

    What answers rest on belongs to the same, also when they are gone.
    """
    if folder.predictions.is_file() or folder.reliance.is_file():
        refuse_other(folder, identity)
    record(folder, identity)


def _score_reports(book: PredictionLog, samples: Sequence[Sample], settings: EvaluationConfig) -> Mapping[str, str]:
    """Report metrics of all answers that have a reference; returns which are absent, and why."""
    written = [book.predictions[sample.id] for sample in samples if sample.answer]
    if not written:
        return {}
    folders = {name: Path(str(place)) for name, place in settings.weights.items()}
    scored = radiology_scores([one.prediction for one in written], [one.answer for one in written], folders)
    book.score_reports(
        {one.id: {name: values[row] for name, values in scored.values.items()} for row, one in enumerate(written)}
    )
    return scored.absent


def _answer(
    vlm: Vlm, ahead: Sequence[Ahead[Read]], settings: EvaluationConfig
) -> tuple[list[tuple[Prediction, Map]], Cost]:
    """Predictions of a batch, each with its map over the selected heads, and what they took."""
    start = time.perf_counter()
    batch, seen = [one.sample for one in ahead], [one.read() for one in ahead]
    asked, regions = [one.example for one in seen], [one.region_N for one in seen]
    generated = answers(vlm, batch, asked, regions, settings)
    answered = with_answers(asked, generated)
    maps = zip(*attend(vlm, answered, settings), strict=True)
    predicted = []
    for sample, example, region, (selected_N, all_N) in zip(batch, answered, regions, maps, strict=True):
        text = answer_text(vlm, example.input_ids[example.prompt_length :])
        attention = {}
        if region is not None:
            placed_N = ~np.isnan(example.boxes[:, 0])
            attention |= attention_scores(selected_N[placed_N], region[placed_N], settings)
            everywhere = attention_scores(all_N[placed_N], region[placed_N], settings)
            attention |= {name + ALL_HEADS: value for name, value in everywhere.items()}
        scale = selected_N.max(initial=0.0) or 1.0
        predicted.append((make_prediction(sample, text, attention), (selected_N / scale).astype(np.float16)))
    return predicted, Cost(time.perf_counter() - start, generated.seconds, generated.passes, generated.peak_bytes)
