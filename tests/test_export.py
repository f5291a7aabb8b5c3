import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from a3tune.data.images import content_hash
from a3tune.labels.export import export_coco, export_overlays
from a3tune.labels.make import LabelMaker
from a3tune.labels.store import LabelStore, label_images
from test_store import BRIGHT, Brightness, Quarters, make_samples


@pytest.fixture
def labelled(tmp_path):
    samples = make_samples(tmp_path, 2)
    label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "store")
    return samples, LabelStore(tmp_path / "store")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools itself
def test_coco_reads_what_was_exported(labelled, tmp_path, capsys):
    samples, store = labelled
    done = export_coco(store, samples, tmp_path / "coco.json", top_k=2)
    assert (done.images, done.segments, done.skipped) == (2, 8, {})
    coco = COCO(str(tmp_path / "coco.json"))
    capsys.readouterr()
    assert [image["file_name"] for image in coco.imgs.values()] == [content_hash(s.image) for s in samples[::2]]
    assert str(tmp_path) not in (tmp_path / "coco.json").read_text()
    for sample in samples:
        labels = store.labels(sample, 2)
        found = [note for note in coco.anns.values() if note["question_id"] == sample.id]
        assert [note["similarity"] for note in found] == list(labels.similarity)
        for note in found:
            mask = coco.annToMask(note)
            assert mask.shape == (8, 12) and mask.sum() == note["area"] == 24
            x, y, width, height = map(int, note["bbox"])
            assert mask[y : y + height, x : x + width].all()


def test_an_image_without_segments_is_still_listed(tmp_path):
    class Nothing(Quarters):
        def __call__(self, image):
            return []

    samples = make_samples(tmp_path, 1)
    label_images(samples, LabelMaker(Nothing(), Brightness()), tmp_path / "store")
    done = export_coco(LabelStore(tmp_path / "store"), samples, tmp_path / "coco.json")
    assert (done.images, done.segments) == (1, 0)
    (image,) = json.loads((tmp_path / "coco.json").read_text())["images"]
    assert (image["height"], image["width"]) == (8, 12)


def test_samples_without_labels_are_listed_and_the_rest_is_exported(labelled, tmp_path):
    samples, store = labelled
    strangers = [
        replace(samples[0], id="new", prompt="never asked"),
        replace(samples[0], id="gone", image=tmp_path / "gone.png"),
    ]
    for export, out in ((export_coco, tmp_path / "coco.json"), (export_overlays, tmp_path / "pictures")):
        done = export(store, [*strangers, *samples], out, top_k=1)
        assert done.segments == 4
        assert "its question has no labels" in done.skipped["new"] and "cannot read" in done.skipped["gone"]


def test_pictures_show_the_segments_in_green_and_their_boxes_in_red(labelled, tmp_path):
    samples, store = labelled
    sample = replace(samples[0], id="../a b")
    done = export_overlays(store, [sample], tmp_path / "pictures", top_k=1)
    assert (done.images, done.segments) == (1, 1)
    (file,) = (tmp_path / "pictures").iterdir()
    assert file.name == "00001_.._a_b.png"
    before, after = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (sample.image, file))
    assert BRIGHT[0] == 1
    red = (after == (255, 0, 0)).all(-1)
    assert red[0, 6:].all() and red[3, 6:].all() and red[:4, 6].all() and red[:4, 11].all() and red.sum() == 16
    inside = after[1:3, 7:11].reshape(-1, 3)
    assert (inside[:, 1] > inside[:, 0]).all()
    assert np.array_equal(after[4:], before[4:]) and np.array_equal(after[:, :6], before[:, :6])
