"""Label -> train -> eval -> ask on every family: what users do, on tiny random models and two phantom patients."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from a3tune.commands.ask import ask
from a3tune.commands.evaluate import evaluate_run
from a3tune.commands.label import label
from a3tune.commands.train import fine_tune
from a3tune.config import RunConfig, load_config
from a3tune.data.phantom import write_phantom
from a3tune.data.rows import read_rows, read_split, write_rows
from a3tune.evaluation.predictions import read_maps
from a3tune.labels.stored import read_quality
from a3tune.run.folder import RunFolder
from a3tune.types import Region
from zoo import ZOO


def silent(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def settings(ranker_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Settings of a short run on four labelled questions."""
    folder = tmp_path_factory.mktemp("chain")
    files = write_phantom(folder / "data", {"train": 2, "test": 1}, seed=5)
    for split, count in (("train", 4), ("test", 2)):
        rows = [sample for sample in read_rows(files[split]) if sample.regions]
        write_rows(folder / "data" / f"few-{split}.jsonl", rows[:: len(rows) // count][:count])
    config = load_config(
        None,
        [
            f"data.train={folder / 'data' / 'few-train.jsonl'}",
            f"data.test={folder / 'data' / 'few-test.jsonl'}",
            f"labels.ranker={ranker_folder}",
            f"labels.store={folder / 'labels'}",
            "adapter.rank=2",
            "adapter.expert_rank=2",
            "alignment.heads=0.5",
            "training.max_steps=2",
            "training.batch_size=2",
            "training.log_steps=1",
            "evaluation.max_new_tokens=4",
        ],
    )
    run, _ = label(config, silent)
    assert not run.failures
    return config


def test_the_quality_of_labels_is_kept_for_each_k(settings: RunConfig):
    recall = {}
    for k in (1, 64):
        own = replace(settings, labels=replace(settings.labels, top_k=k))
        run, _ = label(own, silent)
        found = read_quality(own.label_store, run.settings, k, read_split(own.data, "train"))
        assert found is not None
        recall[k] = found["all"].recall
    assert len(list((settings.label_store / "quality").iterdir())) == 3
    first, *rest = read_split(settings.data, "train")
    moved = replace(first, regions=(Region(box=(0.0, 0.0, 2.0, 2.0)),))
    assert read_quality(settings.label_store, run.settings, 64, [moved, *rest]) is None
    assert recall[1] < recall[64]


@pytest.mark.parametrize("name", ZOO)
def test_the_whole_chain(name: str, settings: RunConfig, tmp_path: Path):
    ZOO[name](tmp_path / "model")
    model = replace(settings.model, path=str(tmp_path / "model"), device="cpu")
    config = replace(settings, model=model, output=tmp_path / "run")
    folder = fine_tune(config, silent)
    logged = (folder / "metrics.jsonl").read_text()
    assert '"loss_align"' in logged
    assert "NaN" not in logged
    results = evaluate_run(config, folder / "adapter", silent)
    assert {"attention_mass", "coverage"} <= results.metrics.keys()
    maps = read_maps(RunFolder(folder))
    assert len(maps) == len(results.predictions) == 2
    assert all(np.isfinite(drawn).any() for drawn in maps.values())
    image = read_rows(Path(str(config.data.test)))[0].image
    assert isinstance(image, Path)
    ask(config, folder / "adapter", image, "Where is it?", tmp_path / "heat.png")
    with Image.open(tmp_path / "heat.png") as heat, Image.open(image) as scan:
        assert heat.size == scan.size
        assert np.ptp(np.asarray(heat)) > 0
