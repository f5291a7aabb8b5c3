"""What a user sees of labels before training: a page, a status, a word about images that the ranker does not know."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from a3tune.data.phantom import make_scan
from a3tune.errors import LabelError
from a3tune.labels.make import LabelMaker
from a3tune.labels.quality import Quality
from a3tune.labels.rank.known import WARNING, warn_of
from a3tune.labels.sheet import write_sheet
from a3tune.labels.status import store_status
from a3tune.labels.store import LabelStore, label_images
from a3tune.labels.stored import QUALITY
from test_store import Brightness, Quarters, make_samples


def test_a_contact_sheet_is_one_page_without_script_and_escapes_what_people_write(tmp_path):
    samples = [replace(row, prompt="<script>alert(1)</script>") for row in make_samples(tmp_path, 3)]
    label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "store")
    store = LabelStore(tmp_path / "store")
    stranger = replace(samples[0], id="new", prompt="never asked")
    done = write_sheet(store, [*samples, stranger], tmp_path / "labels.html", 10, top_k=2)
    page = (tmp_path / "labels.html").read_text()
    assert (done.images, done.segments, list(done.skipped)) == (6, 12, ["new"])
    assert page.count("<figure>") == page.count('src="data:image/jpeg;base64,') == 6
    assert "default-src 'none'" in page and "<script" not in page and "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "") and str(tmp_path) not in page
    assert "query: " in page and "similarity: " in page
    assert write_sheet(store, samples, tmp_path / "few.html", 2).images == 2


def test_status_shows_the_ceiling_beside_the_recall(tmp_path):
    label_images(make_samples(tmp_path), LabelMaker(Quarters(), Brightness()), tmp_path / "store")
    (labels,) = store_status(tmp_path / "store").finished
    assert labels.quality == {}
    name = LabelStore(tmp_path / "store").settings.name
    file = tmp_path / "store" / QUALITY / f"{name}-4.json"
    file.parent.mkdir()
    group = (
        '{"samples": 3, "recall": 0.2, "best_iou": 0.3, "ceiling_recall": 0.6, "ceiling_iou": 0.5, "precision": 0.1}'
    )
    for text in (f'{{"all": {group}}}', f'{{"rows": "x", "quality": {{"all": {group}}}}}'):
        file.write_text(text)
        (labels,) = store_status(tmp_path / "store").finished
        assert labels.quality == {4: Quality(3, 0.2, 0.3, 0.6, 0.5, 0.1)}
    file.write_text("{")
    with pytest.raises(LabelError, match="damaged"):
        store_status(tmp_path / "store")


def test_the_shipped_ranker_is_warned_of_where_images_are_no_phantoms(tmp_path):
    phantom, radiograph, colour = (tmp_path / f"{name}.png" for name in ("phantom", "radiograph", "colour"))
    Image.fromarray(make_scan(3).image).save(phantom)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 180), dtype=np.uint8)).save(radiograph)
    Image.new("RGB", (120, 120), (9, 99, 199)).save(colour)
    assert warn_of("tiny", [phantom] * 3) == ""
    assert warn_of("biomedclip", [radiograph]) == ""
    assert warn_of("tiny", [Path("none.png"), phantom]) == ""
    for other in (radiograph, colour):
        assert warn_of("tiny", [phantom, other]) == WARNING
    assert "\n" not in WARNING and "labels.proposer=sam" in WARNING and "BiomedCLIP" in WARNING
