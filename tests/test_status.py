import weakref

import pytest

from a3tune.errors import LabelError
from a3tune.labels import status as looking
from a3tune.labels import store
from a3tune.labels.make import LabelMaker
from a3tune.labels.status import store_status
from a3tune.labels.store import label_images
from test_store import Brightness, Quarters, make_samples


def test_a_store_in_numbers_and_words(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_IMAGES", 2)
    folder = tmp_path / "store"
    maker = LabelMaker(Quarters(grid=2), Brightness(content="f" * 64), "crop")
    label_images(make_samples(tmp_path), maker, folder)
    status = store_status(folder)
    (labels,) = status.finished
    assert (labels.images, labels.segments, labels.rankings) == (3, 12, 6)
    assert (status.shards, status.damaged) == (6, ())
    assert status.bytes == sum(path.stat().st_size for path in folder.rglob("*.parquet"))
    assert labels.settings == {
        "proposer": "quarters (grid 2)",
        "visual_prompt": "crop",
        "ranker": "brightness (content ffffffffffff)",
        "query": "{question}",
    }
    label_images(make_samples(tmp_path, 1), LabelMaker(Quarters(), Brightness()), folder)
    both = store_status(folder)
    assert labels in both.finished and both.shards == 9
    (other,) = (found for found in both.finished if found != labels)
    assert (other.images, other.segments, other.rankings) == (1, 4, 2)


def test_a_run_that_never_finished_has_files_but_no_settings(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label_images(make_samples(tmp_path), LabelMaker(Quarters(), Brightness()), tmp_path / "store", progress=stop)
    status = store_status(tmp_path / "store")
    assert status.finished == () and status.shards == 3


def test_damaged_shards_are_listed_and_not_counted(tmp_path):
    folder = tmp_path / "store"
    label_images(make_samples(tmp_path), LabelMaker(Quarters(), Brightness()), folder)
    (shard,) = (folder / "similarities").rglob("*.parquet")
    shard.write_bytes(shard.read_bytes()[:50])
    status = store_status(folder)
    assert status.damaged == (shard,)
    (labels,) = status.finished
    assert (labels.images, labels.rankings) == (3, 0)


def test_one_shard_is_in_memory_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_IMAGES", 1)
    label_images(make_samples(tmp_path), LabelMaker(Quarters(), Brightness()), tmp_path / "store")
    read, before, held = looking.read_shard, [], []

    def watched(path, kind):
        held.append(sum(shard() is not None for shard in before))
        table = read(path, kind)
        before.append(weakref.ref(table))
        return table

    monkeypatch.setattr(looking, "read_shard", watched)
    store_status(tmp_path / "store")
    assert held == [0] * 9


def test_folders_that_are_no_store(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(LabelError, match="expected finished region labels, found none"):
            store_status(folder)
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "x.json").write_text('{"query": "x"}')
    with pytest.raises(LabelError, match=r"x\.json: expected the settings"):
        store_status(tmp_path)
