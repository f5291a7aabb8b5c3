import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from a3tune.data.images import content_hash
from a3tune.errors import ConfigError, LabelError, OutputError, RunError
from a3tune.labels import store
from a3tune.labels.make import LabelMaker
from a3tune.labels.store import LabelStore, label_images
from a3tune.labels.truth import truth_labels
from a3tune.masks import box_mask, decode_mask, encode_mask
from a3tune.types import Region, Sample, Segment


class Quarters:
    """Proposes the four quarters of an image, and counts."""

    name = "quarters"

    def __init__(self, **extra):
        self.extra, self.calls = extra, 0

    def settings(self):
        return {"name": self.name, **self.extra}

    def __call__(self, image):
        self.calls += 1
        w, h = image.width / 2, image.height / 2
        boxes = [(x, y, x + w, y + h) for y in (0, h) for x in (0, w)]
        return [Segment(encode_mask(box_mask(box, image.height, image.width)), 0.5) for box in boxes]


class Brightness:
    """Embeds an image as its brightness and a text as light or dark, and counts."""

    name = "brightness"

    def __init__(self, **extra):
        self.extra, self.images, self.texts = extra, 0, 0

    def settings(self):
        return {"name": self.name, **self.extra}

    def embed_images(self, images):
        self.images += len(images)
        angle = np.array([np.asarray(image).mean() / 255 * np.pi / 2 for image in images])
        return np.stack((np.cos(angle), np.sin(angle)), axis=1).astype(np.float32)

    def embed_texts(self, texts):
        self.texts += len(texts)
        return np.array([(0.0, 1.0) if "bright" in text else (1.0, 0.0) for text in texts], dtype=np.float32)


BRIGHT = [1, 3, 0, 2]
"""Quarters of every image, brightest first."""


def make_samples(folder, count=3):
    samples = []
    for index in range(count):
        pixels = np.kron([[100, 250], [30, 200]], np.ones((4, 6))).astype(np.uint8) + index % 5
        path = folder / f"{index}.png"
        Image.fromarray(pixels).save(path)
        path.write_bytes(path.read_bytes() + str(index).encode())
        for word in ("bright", "dark"):
            samples.append(Sample(f"{index}-{word}", path, f"What is {word}?", "a", "open", meta={"organ": "liver"}))
    return samples


def quarters_of(labels, height=8, width=12):
    order = [decode_mask(segment.mask) for segment in labels.segments]
    return [2 * (not mask[0].any()) + (not mask[:, 0].any()) for mask in order]


def test_labels_are_ranked_by_the_prompt_and_cut_at_reading(tmp_path):
    samples = make_samples(tmp_path)
    run = label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "store")
    assert (run.images, run.proposed, run.ranked, run.failures) == (3, 3, 6, {})
    labels = LabelStore(tmp_path / "store")
    for sample in samples:
        order = BRIGHT if "bright" in sample.prompt else BRIGHT[::-1]
        assert quarters_of(labels.labels(sample)) == order
        assert quarters_of(labels.labels(sample, top_k=2)) == order[:2]
        everything = labels.labels(sample, top_k=None)
        assert list(everything.similarity) == sorted(everything.similarity, reverse=True)
        above = labels.labels(sample, top_k=None, threshold=everything.similarity[1])
        assert quarters_of(above) == order[:2]
        assert everything.sample_id == sample.id
        assert decode_mask(everything.segments[0].mask).shape == (8, 12)


def test_nothing_is_made_twice(tmp_path):
    samples = make_samples(tmp_path)
    proposer, ranker = Quarters(), Brightness()
    label_images(samples, LabelMaker(proposer, ranker), tmp_path / "store")
    assert (proposer.calls, ranker.images, ranker.texts) == (3, 12, 2)
    run = label_images(samples, LabelMaker(proposer, ranker), tmp_path / "store")
    assert (run.proposed, run.ranked) == (0, 0)
    new = [replace(samples[0], prompt="A new question about the bright one")]
    assert label_images(new, LabelMaker(proposer, ranker), tmp_path / "store").ranked == 1
    assert (proposer.calls, ranker.images, ranker.texts) == (3, 12, 3)


def test_one_image_under_two_names_runs_once(tmp_path):
    samples = make_samples(tmp_path, 1)
    copy = tmp_path / "copy.png"
    copy.write_bytes(samples[0].image.read_bytes())
    samples += [
        replace(sample, id=f"{sample.id}-copy", image=image)
        for sample in samples
        for image in (copy, copy.read_bytes())
    ]
    proposer = Quarters()
    assert label_images(samples, LabelMaker(proposer, Brightness()), tmp_path / "store").images == proposer.calls == 1
    labels = LabelStore(tmp_path / "store")
    assert len({labels.labels(sample).segments for sample in samples if "bright" in sample.prompt}) == 1


def test_a_changed_setting_makes_again_just_what_depends_on_it(tmp_path):
    samples = make_samples(tmp_path)
    folder = tmp_path / "store"

    def cost(proposer, ranker, **options):
        label_images(samples, LabelMaker(proposer, ranker, **options), folder)
        return proposer.calls, ranker.images, ranker.texts

    assert cost(Quarters(), Brightness()) == (3, 12, 2)
    assert cost(Quarters(), Brightness(), query="{organ}: {question}") == (0, 0, 2)
    assert cost(Quarters(), Brightness(), visual_prompt="crop") == (0, 12, 2)
    assert cost(Quarters(), Brightness(size=2)) == (0, 12, 2)
    assert cost(Quarters(grid=2), Brightness()) == (3, 12, 2)
    assert cost(Quarters(), Brightness()) == (0, 0, 0)


@pytest.mark.parametrize("stop_at", [1, 4, 5, 9])
def test_an_interrupted_run_keeps_what_it_made_and_goes_on(tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr(store, "SHARD_IMAGES", 4)
    samples = make_samples(tmp_path, 10)
    label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "whole")

    def interrupt(done, total):
        assert total == 10
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "store", progress=interrupt)
    with pytest.raises(LabelError, match="a3tune label"):
        LabelStore(tmp_path / "store")
    proposer = Quarters()
    assert label_images(samples, LabelMaker(proposer, Brightness()), tmp_path / "store").proposed == 10 - stop_at
    whole, parts = LabelStore(tmp_path / "whole"), LabelStore(tmp_path / "store")
    assert [parts.labels(sample) for sample in samples] == [whole.labels(sample) for sample in samples]
    for table in (tmp_path / "store").rglob("*.parquet"):
        assert pq.ParquetFile(table).metadata.num_rows


KILLED = """
import os, stat, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from a3tune.labels import store
from a3tune.labels.make import LabelMaker
from test_store import Brightness, Quarters, make_samples
folder = Path(sys.argv[2])
store.SHARD_IMAGES = 2
writes = 0
whole = os.fsync
def dies(descriptor):
    global writes
    writes += not stat.S_ISDIR(os.fstat(descriptor).st_mode)
    if writes == int(sys.argv[3]):
        os.truncate(descriptor, 10)
        os._exit(9)
    whole(descriptor)
os.fsync = dies
store.label_images(make_samples(folder, 4), LabelMaker(Quarters(), Brightness()), folder / "store")
"""


def test_a_run_killed_in_the_middle_of_a_write_loses_no_finished_shard(tmp_path):
    write = 5
    command = [sys.executable, "-c", KILLED, os.path.dirname(__file__), str(tmp_path), str(write)]  # noqa: PTH120
    assert subprocess.run(command).returncode == 9
    samples = make_samples(tmp_path, 4)
    finished = sorted((tmp_path / "store").rglob("*.parquet"))
    assert len(finished) == write - 1
    label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "store")
    keys = {"segments": ["image"], "embeddings": ["image"], "similarities": ["image", "query"]}
    for table, key in keys.items():
        found = [
            tuple(row.values())
            for shard in (tmp_path / "store" / table).rglob("*.parquet")
            for row in pq.ParquetFile(shard).read(key).to_pylist()
        ]
        assert len(found) == len(set(found)) == 4 * len(key)
    assert all(path.exists() for path in finished)
    labels = LabelStore(tmp_path / "store")
    assert all(len(labels.labels(sample).segments) == 4 for sample in samples)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    samples = make_samples(tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="No space left"):
            label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").rglob("*") if path.is_file()] == [".lock"]
    assert label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "store").proposed == 3


def test_images_that_cannot_be_read_are_listed_and_the_rest_is_done(tmp_path):
    samples = make_samples(tmp_path)
    (tmp_path / "cut.png").write_bytes(samples[0].image.read_bytes()[:50])
    bad = [replace(samples[0], id=name, image=tmp_path / name) for name in ("missing.png", "cut.png")]
    calls = []
    run = label_images(
        [*bad, *samples],
        LabelMaker(Quarters(), Brightness()),
        tmp_path / "store",
        progress=lambda *at: calls.append(at),
    )
    assert set(run.failures) == {str(sample.image) for sample in bad}
    assert "cannot read" in run.failures[str(tmp_path / "missing.png")]
    assert calls == [(done, 4) for done in range(1, 5)]
    labels = LabelStore(tmp_path / "store")
    assert len(labels.labels(samples[0]).segments) == 4
    with pytest.raises(LabelError, match=r"sample cut\.png: its image has no labels"):
        labels.labels(bad[1])


def test_an_image_without_segments_has_empty_labels(tmp_path):
    class Nothing(Quarters):
        def __call__(self, image):
            return []

    samples = make_samples(tmp_path, 1)
    label_images(samples, LabelMaker(Nothing(), Brightness()), tmp_path / "store")
    assert LabelStore(tmp_path / "store").labels(samples[0]).segments == ()


def test_what_is_asked_wrongly_stops_before_any_work(tmp_path):
    samples = make_samples(tmp_path, 1)
    proposer = Quarters()
    with pytest.raises(ConfigError, match="visual_prompt: expected one of crop"):
        label_images(samples, LabelMaker(proposer, Brightness(), "corp"), tmp_path / "store")
    with pytest.raises(LabelError, match="plane"):
        label_images(samples, LabelMaker(proposer, Brightness(), query="{plane}"), tmp_path / "store")
    assert proposer.calls == 0
    assert not (tmp_path / "store").exists()


def test_a_damaged_or_foreign_store_is_named(tmp_path):
    samples = make_samples(tmp_path, 1)
    folder = tmp_path / "store"
    label_images(samples, LabelMaker(Quarters(), Brightness()), folder)
    stranger = replace(samples[0], prompt="never asked")
    with pytest.raises(LabelError, match="its question has no labels"):
        LabelStore(folder).labels(stranger)
    shard = next((folder / "segments").rglob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(LabelError, match=f"{shard.name}.*delete this file"):
        LabelStore(folder)
    (settings,) = (folder / "settings").iterdir()
    for text in ("[]", "7", "{}", settings.read_text().replace("{question}", "{organ}")):
        settings.write_text(text)
        with pytest.raises(LabelError, match=f"{settings.name}: expected the settings of a label run"):
            LabelStore(folder)


def test_true_regions_become_labels():
    mask = encode_mask(np.eye(6, 8) > 0)
    regions = (Region(mask=mask, name="rib"), Region(box=(1.0, 1.0, 3.0, 4.0)))
    sample = Sample("7", b"", "p", "a", "open", regions)
    labels = truth_labels(sample, 6, 8)
    assert labels is not None
    assert labels.similarity == (1.0, 1.0)
    assert labels.segments[0].mask == mask
    assert decode_mask(labels.segments[1].mask).sum() == 6
    assert truth_labels(replace(sample, regions=None), 6, 8) is None
    nothing = truth_labels(replace(sample, regions=()), 6, 8)
    assert nothing is not None and nothing.segments == ()
    with pytest.raises(LabelError, match=r"sample 7: region 'rib': .*9 x 6.*8 x 6"):
        truth_labels(sample, 6, 9)


TABLE_KEYS = {"segments": ("image",), "embeddings": ("image",), "similarities": ("image", "query")}


def content(folder):
    """Path -> bytes of everything that a finished run leaves."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(folder):
    """Table -> its rows, sorted by key."""
    found = {}
    for table, key in TABLE_KEYS.items():
        shards = (folder / table).rglob("*.parquet")
        items = [row for shard in shards for row in pq.ParquetFile(shard).read().to_pylist()]
        found[table] = sorted(items, key=lambda row: [row[name] for name in key])
    return found


ENDLESS = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from a3tune.labels import store
from a3tune.labels.make import LabelMaker
from test_store import Brightness, Quarters, SlowQuarters, make_samples
folder = Path(sys.argv[2])
store.SHARD_IMAGES = 3
if __name__ == "__main__":
    samples = make_samples(folder, 12)
    print("ready", flush=True)
    store.label_images(
        samples, LabelMaker(SlowQuarters(), Brightness()), folder / "store", workers=int(sys.argv[3]),
        progress=lambda done, total: print(done, flush=True),
    )
"""


class SlowQuarters(Quarters):
    def __call__(self, image):
        time.sleep(0.02)
        return super().__call__(image)


def start(tmp_path, workers):
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    command = [sys.executable, script, os.path.dirname(__file__), tmp_path, str(workers)]  # noqa: PTH120
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_at_any_moment_ends_as_an_undisturbed_one(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(store, "SHARD_IMAGES", 3)
    (tmp_path / "killed").mkdir()
    process = start(tmp_path / "killed", workers=1)
    time.sleep(random.Random(seed).uniform(0, 0.4))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    samples = make_samples(tmp_path, 12)
    label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "killed" / "store")
    label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "whole")
    assert content(tmp_path / "killed" / "store") == content(tmp_path / "whole")
    made = rows(tmp_path / "whole")
    assert {table: len(found) for table, found in made.items()} == {
        "segments": 12,
        "embeddings": 12,
        "similarities": 24,
    }


def test_two_workers_write_the_same_store_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_IMAGES", 4)
    samples = make_samples(tmp_path, 9)
    (tmp_path / "cut.png").write_bytes(samples[0].image.read_bytes()[:50])
    samples.insert(3, replace(samples[0], id="cut", image=tmp_path / "cut.png"))
    runs, calls = [], []
    for workers in (1, 2):
        runs.append(
            label_images(
                samples,
                LabelMaker(Quarters(), Brightness()),
                tmp_path / str(workers),
                workers=workers,
                progress=lambda *at: calls.append(at),
            )
        )
    assert runs[0] == runs[1] and runs[0].failures.keys() == {str(tmp_path / "cut.png")}
    assert calls == 2 * [(done, 10) for done in range(1, 11)]
    assert content(tmp_path / "1") == content(tmp_path / "2")
    with pytest.raises(ConfigError, match="workers: expected an integer >= 1, got 0"):
        label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "0", workers=0)


def test_rows_that_a_deleted_shard_held_are_made_again_and_only_those(tmp_path):
    samples = make_samples(tmp_path)
    label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "store")
    before = rows(tmp_path / "store")
    for table in ("segments", "similarities"):
        for shard in (tmp_path / "store" / table).rglob("*.parquet"):
            shard.unlink()
        label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "store")
        assert rows(tmp_path / "store") == before


def test_a_prompt_of_3000_words_is_ranked(tmp_path, ranker_folder):
    from a3tune.labels.rank.clip import ClipRanker  # here: the processes that import this file need not wait for torch

    long = replace(make_samples(tmp_path, 1)[0], prompt="where is the liver " * 750)
    label_images([long], LabelMaker(Quarters(), ClipRanker(ranker_folder, device="cpu")), tmp_path / "store")
    assert len(LabelStore(tmp_path / "store").labels(long).segments) == 4


def test_no_samples_make_an_empty_store(tmp_path):
    run = label_images([], LabelMaker(Quarters(), Brightness()), tmp_path / "store")
    assert (run.images, run.proposed, run.ranked, run.failures) == (0, 0, 0, {})
    LabelStore(tmp_path / "store")


def test_stores_of_parts_are_joined_by_copying(tmp_path):
    samples = make_samples(tmp_path, 4)
    for part in (0, 1):
        label_images(samples[4 * part : 4 * part + 4], LabelMaker(Quarters(), Brightness()), tmp_path / str(part))
        shutil.copytree(tmp_path / str(part), tmp_path / "all", dirs_exist_ok=True)
    label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "once")
    assert rows(tmp_path / "all") == rows(tmp_path / "once")
    labels = LabelStore(tmp_path / "all")
    assert all(len(labels.labels(sample).segments) == 4 for sample in samples)


def test_new_questions_need_no_vectors_kept(tmp_path):
    samples = make_samples(tmp_path, 2)
    label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "embeddings")
    assert label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "store").ranked == 0
    new = [*samples, replace(samples[0], prompt="And the bright one?")]
    ranker = Brightness()
    assert label_images(new, LabelMaker(Quarters(), ranker), tmp_path / "store").ranked == 1
    assert ranker.images == 4
    assert quarters_of(LabelStore(tmp_path / "store").labels(new[-1])) == BRIGHT


def test_a_second_run_in_one_store_is_refused(tmp_path):
    samples = make_samples(tmp_path)

    def meanwhile(done, total):
        with pytest.raises(RunError, match="in use by another run"):
            label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "store")

    label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "store", progress=meanwhile)
    assert label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "store").proposed == 0


class PaddedBrightness(Brightness):
    """Embeds a text otherwise in company, as models do in their last bits."""

    def embed_texts(self, texts):
        return super().embed_texts(texts) + np.float32(1e-6 * len(texts))


def test_what_a_text_is_compared_to_does_not_depend_on_its_company(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_IMAGES", 1)
    samples = make_samples(tmp_path)
    label_images(samples[:1], LabelMaker(Quarters(), PaddedBrightness()), tmp_path / "two")
    label_images(samples, LabelMaker(Quarters(), PaddedBrightness()), tmp_path / "two")
    label_images(samples, LabelMaker(Quarters(), PaddedBrightness()), tmp_path / "once")
    assert rows(tmp_path / "two") == rows(tmp_path / "once")


def test_a_stored_image_is_known_by_its_content(tmp_path):
    sample = make_samples(tmp_path, 1)[0]
    label_images([sample], LabelMaker(Quarters(), Brightness()), tmp_path / "store")
    assert LabelStore(tmp_path / "store").image(sample) == (content_hash(sample.image), 8, 12)
