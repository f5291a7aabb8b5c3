import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from a3tune.commands.settings import training_settings
from a3tune.config import LabelsConfig
from a3tune.data.images import load_image
from a3tune.errors import LabelError
from a3tune.labels.fitting import adopt, fitting_settings
from a3tune.labels.make import make_maker
from a3tune.labels.propose import default_settings
from a3tune.labels.store import LabelStore, label_images
from a3tune.models import shipped
from test_store import make_samples

DIM = LabelsConfig()
CROP = LabelsConfig(visual_prompt="crop", proposal={"min_area": 0.01})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of one settings, which are not the defaults."""
    return _labelled(tmp_path_factory.mktemp("store"), CROP)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _labelled(tmp_path_factory.mktemp("both"), CROP, DIM)


def _labelled(folder: Path, *settings: LabelsConfig) -> Path:
    for own in settings:
        given = {name: getattr(own, name) for name in ("visual_prompt", "proposal", "proposer", "query", "ranker")}
        label_images(make_samples(folder, 1), make_maker(own, "cpu"), folder / "labels", given=given)
    return folder / "labels"


def test_what_nobody_said_is_what_the_labels_were_made_with(store: Path):
    assert adopt(store, DIM, ()) == CROP
    assert adopt(store, replace(DIM, top_k=2, source="truth"), {"top_k"}) == replace(CROP, top_k=2, source="truth")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_settings_from_a_pipe_are_said_as_those_of_a_file(store: Path, tmp_path: Path):
    text = f"data:\n  train: {tmp_path}\nlabels:\n  store: {store}\n  visual_prompt: dim\n"
    (tmp_path / "file.yaml").write_text(text)
    os.mkfifo(tmp_path / "pipe.yaml")
    threading.Thread(target=(tmp_path / "pipe.yaml").write_text, args=(text,), daemon=True).start()
    for name in ("file.yaml", "pipe.yaml"):
        with pytest.raises(LabelError, match=r"labels.visual_prompt is dim, theirs were made with crop"):
            training_settings(tmp_path / name, ())


def test_a_contradiction_is_named(store: Path):
    with pytest.raises(LabelError, match=r"labels.visual_prompt is dim, theirs were made with crop"):
        adopt(store, DIM, {"visual_prompt"})
    with pytest.raises(LabelError, match=r"labels.proposal min_area is 0.5, theirs were made with 0.01"):
        adopt(store, replace(DIM, proposal={"min_area": 0.5}), {"proposal"})
    with pytest.raises(LabelError, match=r"labels.proposal min_area is 0.001, theirs were made with 0.01"):
        fitting_settings(store, replace(CROP, proposal={}))
    with pytest.raises(LabelError, match=r"labels.query is \{organ\}"):
        adopt(store, replace(DIM, query="{organ}"), {"query"})
    with pytest.raises(LabelError, match=r"labels.proposer is sam"):
        adopt(store, replace(DIM, proposer="sam"), {"proposer"})


def test_a_model_is_known_by_its_content(store: Path, ranker_folder: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in shipped("ranker").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert fitting_settings(store, replace(CROP, ranker=str(copy)))
    with pytest.raises(LabelError, match=r"labels.ranker is .*, which is not the model"):
        fitting_settings(store, replace(CROP, ranker=str(ranker_folder)))


def test_labels_of_several_settings_are_chosen_by_what_is_said(both: Path):
    with pytest.raises(LabelError, match=r"labels of 2 settings, say which: .*labels.visual_prompt=(crop|dim)"):
        adopt(both, DIM, ())
    assert adopt(both, DIM, {"visual_prompt"}) == DIM
    assert adopt(both, replace(DIM, visual_prompt="crop"), {"visual_prompt"}) == CROP
    assert fitting_settings(both, DIM).name != fitting_settings(both, CROP).name
    with pytest.raises(LabelError, match="holds labels of 2 settings; say which"):
        LabelStore(both)


def test_nothing_in_a_store_is_moved_by_reading(both: Path):
    before = {path: path.stat().st_mtime_ns for path in both.rglob("*") if path.is_file()}
    for own in (DIM, CROP):
        LabelStore(both, fitting_settings(both, own).name)
    assert before == {path: path.stat().st_mtime_ns for path in both.rglob("*") if path.is_file()}


def test_in_memory_and_in_the_store_are_the_same_labels(store: Path):
    for sample in make_samples(store.parent, 1):
        made = make_maker(CROP, "cpu").find(load_image(sample.image), sample).labels(sample.id, 2)
        stored = LabelStore(store).labels(sample, 2)
        assert [found.mask for found in made.segments] == [found.mask for found in stored.segments]
        assert made.similarity == pytest.approx(stored.similarity, abs=1e-6)


def test_no_labels_say_how_to_make_them(tmp_path: Path):
    with pytest.raises(LabelError, match="found none; make them with `a3tune label`"):
        fitting_settings(tmp_path, DIM)


def test_a_default_that_is_written_out_is_no_other_setting(tmp_path: Path):
    store = _labelled(tmp_path, DIM)
    before = {path.name: path.read_bytes() for path in (store / "settings").iterdir()}
    written = replace(DIM, proposal={"min_area": default_settings("superpixels")["min_area"]})
    assert _labelled(tmp_path, written) == store
    assert {path.name: path.read_bytes() for path in (store / "settings").iterdir()} == before
    assert fitting_settings(store, written).name == fitting_settings(store, DIM).name


def test_what_was_adopted_goes_by_the_name_of_its_model(tmp_path: Path):
    ranker = tmp_path / "ranker"
    shutil.copytree(shipped("ranker"), ranker)
    own = replace(DIM, ranker=str(ranker))
    store = _labelled(tmp_path, own)
    (ranker / "notes.json").write_text("{}")
    with pytest.raises(LabelError, match="is not the model"):
        fitting_settings(store, own)
    assert fitting_settings(store, adopt(store, DIM, ()), by_name=True)


def test_labels_made_in_python_can_be_adopted(tmp_path: Path):
    label_images(make_samples(tmp_path, 1), make_maker(CROP, "cpu"), tmp_path / "labels")
    adopted = adopt(tmp_path / "labels", DIM, ())
    assert (adopted.visual_prompt, adopted.proposal) == ("crop", {"min_area": 0.01})
    assert fitting_settings(tmp_path / "labels", adopted)


def test_a_store_of_an_earlier_version_says_how_to_go_on(tmp_path: Path):
    (tmp_path / "current.json").write_text("{}")
    with pytest.raises(LabelError, match="of an earlier version of a3tune; run `a3tune label` on it once"):
        fitting_settings(tmp_path, DIM)
