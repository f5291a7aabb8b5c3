"""Reading ahead changes when images are read, and nothing else."""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from a3tune.errors import DataError
from a3tune.evaluation import asking, reliance
from a3tune.evaluation import evaluate as evaluation
from a3tune.evaluation.ahead import Ahead, read_ahead
from a3tune.evaluation.evaluate import evaluate
from a3tune.evaluation.predictions import read_predictions
from a3tune.machine.quiet import ignoring
from a3tune.run.folder import RunFolder
from a3tune.types import Region, Sample
from a3tune.vlm.load import Vlm
from evaluations import stop_after
from test_evaluate import SHORT, make_vlm, picture

BATCHES = [[Sample(f"{batch}-{n}", b"", "Is it?", "no", "closed") for n in range(2)] for batch in range(4)]
SECONDS = 20


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return make_vlm()


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Six questions of like length, each about a file of its own, a region in every second."""
    for n in range(6):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
    regions = ((Region(box=(0, 0, 12, 12)),), None)
    return [
        Sample(f"{n}", tmp_path / f"{n}.png", "What is it?", "a liver", "open", regions[n % 2], {"patient": f"{n}"})
        for n in range(6)
    ]


@contextmanager
def read_when_asked(
    read: Callable[[Sample], Any], batches: Sequence[Sequence[Sample]]
) -> Iterator[Iterator[Sequence[Any]]]:
    """As it was before: the obvious way."""

    class Now:
        def __init__(self, sample: Sample) -> None:
            self.sample, self.id = sample, sample.id

        def read(self) -> Any:
            return read(self.sample)

    yield ([Now(sample) for sample in batch] for batch in batches)


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("reading")]


def test_the_next_batch_is_read_meanwhile_and_no_further_one():
    begun = {sample.id: threading.Event() for batch in BATCHES for sample in batch}
    where: set[str] = set()

    def read(sample: Sample) -> str:
        where.add(threading.current_thread().name)
        begun[sample.id].set()
        return sample.id

    with read_ahead(read, BATCHES) as ahead:
        for number, batch in enumerate(ahead):
            assert [one.read() for one in batch] == [one.id for one in batch] == [one.id for one in BATCHES[number]]
            for following in BATCHES[number + 1 : number + 2]:
                assert all(begun[sample.id].wait(SECONDS) for sample in following)
            assert not any(begun[sample.id].is_set() for later in BATCHES[number + 2 :] for sample in later)
    assert len(where) == 1 and not reading_threads()
    with read_ahead(read, []) as ahead:
        assert list(ahead) == []


def test_an_error_comes_with_its_sample_each_time():
    def read(sample: Sample) -> str:
        if sample.id == "1-1":
            raise DataError(sample.id)
        return sample.id

    with read_ahead(read, BATCHES) as ahead:
        first, second, third, _ = ahead
        assert [one.read() for one in (*first, *third)] and second[0].read()
        for _ in range(2):
            with pytest.raises(DataError, match="1-1"):
                second[1].read()


def test_stopped_it_leaves_no_thread_and_reads_no_more():
    seen: list[str] = []
    going, go_on = threading.Event(), threading.Event()

    def read(sample: Sample) -> None:
        seen.append(sample.id)
        going.set()
        assert go_on.wait(SECONDS)

    def stop() -> None:
        with read_ahead(read, BATCHES) as ahead:
            next(ahead)
            assert going.wait(SECONDS)
            threading.Timer(0.05, go_on.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert seen == ["0-0"] and not reading_threads()


@pytest.mark.parametrize("settings", [SHORT, replace(SHORT, decode="vcd"), replace(SHORT, occlude=True)])
def test_answers_and_maps_are_those_of_reading_in_between(vlm, samples, monkeypatch, settings):
    found = evaluate(vlm, samples, settings)
    monkeypatch.setattr(evaluation, "read_ahead", read_when_asked)
    expected = evaluate(vlm, samples, settings)
    assert found.predictions == expected.predictions
    assert all(np.array_equal(found.maps[name], expected.maps[name]) for name in expected.maps)
    assert replace(found, cost=expected.cost).as_json() == expected.as_json()


@pytest.mark.parametrize("occlude", [False, True])
def test_an_unreadable_image_is_named_behind_what_was_answered_before(vlm, samples, tmp_path, monkeypatch, occlude):
    folder, settings = RunFolder(tmp_path / "run"), replace(SHORT, occlude=occlude)
    if occlude:
        evaluate(vlm, samples, SHORT, out_folder=folder.path)
    bad = samples[3].image
    assert isinstance(bad, Path)
    load, module = asking.load_image, reliance if occlude else asking

    def damaged(source: Any) -> Any:
        if source == bad:
            raise DataError(f"{source}: expected a complete image file")
        return load(source)

    monkeypatch.setattr(module, "load_image", damaged)
    with pytest.raises(DataError, match=rf"^sample 3: {bad}: expected a complete image file"):
        evaluate(vlm, samples, settings, out_folder=folder.path)
    assert not reading_threads()
    done = folder.reliance.read_text().splitlines()[1:] if occlude else read_predictions(folder)
    assert len(done) == 2  # the batch ahead of it


def test_an_interrupted_evaluation_leaves_no_thread(vlm, samples, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evaluate(vlm, samples, SHORT, out_folder=tmp_path / "run", progress=stop_after(1))
    assert not reading_threads() and len(read_predictions(RunFolder(tmp_path / "run"))) == 2


def test_halves_of_a_batch_read_nothing_again(vlm, samples, monkeypatch):
    expected, read, generate = evaluate(vlm, samples, SHORT).predictions, [], vlm.model.generate
    load = asking.load_image
    monkeypatch.setattr(asking, "load_image", lambda source: read.append(source) or load(source))

    def little_memory(**inputs: Any) -> torch.Tensor:
        if len(inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError
        return generate(**inputs)

    monkeypatch.setattr(vlm.model, "generate", little_memory)
    assert [one.prediction for one in evaluate(vlm, samples, SHORT).predictions] == [one.prediction for one in expected]
    assert sorted(read) == sorted(sample.image for sample in samples)


def test_warnings_that_two_threads_silence_are_heard_again():
    before, inside, leave = list(warnings.filters), threading.Event(), threading.Event()

    def silence() -> None:
        with ignoring():
            inside.set()
            leave.wait(SECONDS)

    thread = threading.Thread(target=silence)
    thread.start()
    assert inside.wait(SECONDS)
    threading.Timer(0.05, leave.set).start()
    with ignoring("a known one"):  # waits for the other
        assert not thread.is_alive() or leave.is_set()
    thread.join()
    assert warnings.filters == before
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)


def test_a_batch_is_of_samples():
    with read_ahead(lambda sample: sample.prompt, BATCHES[:1]) as ahead:
        (batch,) = ahead
    assert all(isinstance(one, Ahead) and one.sample in BATCHES[0] for one in batch)
