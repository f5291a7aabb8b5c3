"""Batches: segments on image tokens, the cache's bound, and errors that name the sample."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from a3tune.errors import DataError, LabelError
from a3tune.masks import encode_mask
from a3tune.training.collate import Collator
from a3tune.types import Labels, Sample, Segment
from a3tune.vlm.load import Vlm
from a3tune.vlm.tiny import random_vlm, tiny_processor, train_tokenizer

SIDE = 4
PIXELS = 48


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    processor = tiny_processor(train_tokenizer(["What is shown?", "left lung"]), image_size=PIXELS)
    return Vlm(random_vlm(hidden=32, layers=1, heads=2, kv_heads=1, image_size=PIXELS), processor, "tiny")


def sample(name: str, **changes: object) -> Sample:
    file = io.BytesIO()
    Image.new("RGB", (PIXELS, PIXELS), "gray").save(file, "PNG")
    fields = {
        "image": file.getvalue(),
        "prompt": "What is shown?",
        "answer": "left lung",
        "answer_type": "open",
    } | changes
    return Sample(id=name, **fields)


def labels(*corners: tuple[int, int], size: int = PIXELS) -> Labels:
    """One 12-pixel square per corner (row, column of the token grid): exactly one token each."""
    segments = []
    for row, column in corners:
        mask = np.zeros((size, size), bool)
        mask[row * 12 : row * 12 + 12, column * 12 : column * 12 + 12] = True
        segments.append(Segment(encode_mask(mask)))
    return Labels("x", tuple(segments), (1.0,) * len(segments))


def test_segments_stand_on_their_image_tokens(vlm: Vlm) -> None:
    known = {"a": labels((1, 2)), "b": labels((0, 0), (3, 3)), "c": None}
    batch = Collator(vlm, lambda sample, *_: known[sample.id])([sample("a"), sample("b"), sample("c")])
    expected = torch.zeros(3, 2, SIDE * SIDE)
    expected[0, 0, 1 * SIDE + 2] = expected[1, 0, 0] = expected[1, 1, -1] = 1
    assert torch.equal(batch["segments"], expected)
    assert batch["sample_ids"] == ["a", "b", "c"]
    assert batch["image_mask"].sum(1).tolist() == [SIDE * SIDE] * 3


def test_a_batch_without_labels_has_no_segments(vlm: Vlm) -> None:
    batch = Collator(vlm, lambda *_: None)([sample("a"), sample("b", answer="left")])
    assert batch["segments"].shape == (2, 0, SIDE * SIDE)
    assert torch.equal(batch["labels"] != -100, batch["answer_mask"][:, -batch["logits_to_keep"] :])


def test_the_loss_without_logits_of_the_prompt_is_the_loss(vlm: Vlm) -> None:
    batch = Collator(vlm, lambda *_: None)([sample("a"), sample("b", prompt="Which side is it on?", answer="left")])
    names = ("input_ids", "attention_mask", "pixel_values")
    inputs = {name: batch[name] for name in names}
    everywhere = batch["input_ids"].where(batch["answer_mask"], -100)
    expected = vlm.model(**inputs, labels=everywhere)
    cut = vlm.model(**inputs, labels=batch["labels"], logits_to_keep=batch["logits_to_keep"])
    assert cut.logits.shape[1] < expected.logits.shape[1]
    torch.testing.assert_close(cut.loss, expected.loss)
    assert batch["attention_mask"][:, 0].all()


def test_membership_is_the_covered_share(vlm: Vlm) -> None:
    mask = np.zeros((PIXELS, PIXELS), bool)
    mask[:12, :16] = True
    found = Labels("a", (Segment(encode_mask(mask)),), (1.0,))
    chosen = [
        Collator(vlm, lambda *_: found, membership=share)([sample("a")])["segments"].sum().item()
        for share in (0.3, 0.5)
    ]
    assert chosen == [2, 1]


def test_the_cache_is_used_and_bounded(vlm: Vlm, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (PIXELS, PIXELS)).save(file)
    one = Collator(vlm, lambda *_: None)([sample("a", image=file)])
    nbytes = sum(one[key].nbytes for key in ("pixel_values", "input_ids"))
    collator = Collator(vlm, lambda *_: None, cache_bytes=int(2.5 * nbytes))
    collator([sample("a", image=file)])
    collator([sample("b", image=file)])
    file.unlink()
    assert torch.equal(collator([sample("a", image=file)])["pixel_values"], one["pixel_values"])
    collator([sample("c")])  # pushes out b, the least recently used
    collator([sample("a", image=file)])
    with pytest.raises(DataError):
        collator([sample("b", image=file)])


def test_a_sample_that_cannot_be_used_is_named(vlm: Vlm) -> None:
    with pytest.raises(DataError, match="sample broken: "):
        Collator(vlm, lambda *_: None)([sample("broken", image=b"no image")])
    with pytest.raises(DataError, match=r"sample control: prompt .* control token"):
        Collator(vlm, lambda *_: None)([sample("control", prompt="</s>")])


def test_labels_of_another_image_size_are_an_error(vlm: Vlm) -> None:
    with pytest.raises(
        LabelError, match="sample a: its labels are for an image of 60 x 60 pixels, but the image has 48 x 48"
    ):
        Collator(vlm, lambda *_: labels((0, 0), size=60))([sample("a")])
