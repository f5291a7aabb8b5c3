"""Rows in memory and batches of other collators: the same batch as from a file, or a reason why not."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from a3tune.errors import DataError, LabelError
from a3tune.masks import decode_mask, encode_mask
from a3tune.training.collate import IGNORED
from a3tune.training.step import Alignment
from a3tune.types import Labels, Region, Sample, Segment
from trainings import PIXELS, fresh_vlm, samples, square

DATA = samples(3)
MASKS = [[decode_mask(region.mask) for region in sample.regions or ()] or None for sample in DATA]
NAMES = ("image_mask", "prompt_mask", "answer_mask", "placed_mask", "segments")


@pytest.fixture(scope="module")
def align() -> Alignment:
    vlm = fresh_vlm()
    return Alignment(vlm.model, vlm.processor, heads=3)


def picture(sample: Sample) -> Image.Image:
    return Image.open(io.BytesIO(sample.image)).convert("RGB")  # pyright: ignore[reportArgumentType]


def row(sample: Sample, **more: Any) -> dict[str, Any]:
    return {"image": picture(sample), "prompt": sample.prompt, "answer": sample.answer} | more


def same(batch: dict[str, Any], expected: dict[str, Any]) -> None:
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(batch[name], value), name


@pytest.mark.parametrize(
    "regions",
    [
        MASKS,
        [None if masks is None else np.stack(masks) for masks in MASKS],
        [None if masks is None else [Region(mask=encode_mask(mask)) for mask in masks] for masks in MASKS],
        [None if m is None else Labels("x", tuple(Segment(encode_mask(x)) for x in m), (1.0,) * len(m)) for m in MASKS],
        [[(0, 0, 12, 12)], [(7, 11, 19, 23)], None],
    ],
    ids=["masks", "array", "regions", "labels", "boxes"],
)
def test_rows_in_memory_make_the_batch_of_samples(align: Alignment, regions: Any) -> None:
    expected = align.collate(DATA)
    assert expected["segments"].sum() > 0
    same(align.collate([row(sample) for sample in DATA], regions), expected)
    same(align.collate([replace(sample, regions=None) for sample in DATA], regions), expected)
    rows = [row(sample, regions=given) for sample, given in zip(DATA, regions, strict=True)]
    same(align.collate(rows), expected)


def test_another_batch_of_rows_without_ids_is_another_batch(align: Alignment) -> None:
    first, second = (align.collate([row(sample)]) for sample in DATA[:2])
    assert not torch.equal(first["pixel_values"], second["pixel_values"])


@pytest.mark.parametrize(
    ("regions", "error", "message"),
    [
        ([None], DataError, "regions: expected one entry for each of the 2 rows, got 1"),
        ([None, square(0, 0)], LabelError, r"sample row-1: regions: expected a list of boxes or masks"),
        ([None, [square(0, 0)[:9]]], LabelError, r"sample row-1: .*48 x 48"),
        ([None, 7], LabelError, "sample row-1: regions: expected a list of boxes or masks, got 7"),
        ([None, [(9, 9, 3, 3)]], LabelError, "x0 < x1"),
        ([None, [(0.1, 0.1, 0.4, 0.4)]], LabelError, "not shares of its width and height"),
        ([None, [square(0, 0) * np.arange(48)]], LabelError, "expected a mask of one region"),
    ],
)
def test_regions_that_are_none_are_told(align: Alignment, regions: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        align.collate([row(sample) for sample in DATA[:2]], regions)


def own_batch(align: Alignment, left: bool = False) -> dict[str, Any]:
    """As a collator of one's own makes it: what the model takes, labels of the whole length."""
    made = align.collate(DATA)
    names = ("input_ids", "attention_mask", "pixel_values")
    batch = {name: made[name] for name in names}
    batch["labels"] = made["input_ids"].where(made["answer_mask"], IGNORED)
    if left:
        for name, fill in (("input_ids", align.vlm.tokenizer.pad_token_id), ("attention_mask", 0), ("labels", IGNORED)):
            for index, length in enumerate(made["attention_mask"].sum(1).tolist()):
                kept = batch[name][index, :length].clone()
                batch[name][index] = fill
                batch[name][index, -length:] = kept
    return batch


def test_a_batch_of_another_collator_gives_the_same_loss(align: Alignment) -> None:
    images, expected = [picture(sample) for sample in DATA], align.collate(DATA)
    batch = align.adopt(own_batch(align), images, MASKS)
    for name in NAMES:
        assert torch.equal(batch[name], expected[name]), name
    model: Any = align.vlm.model.eval()
    found, ours = (align.losses(model, one) for one in (batch, expected))
    torch.testing.assert_close(found.total, ours.total)
    turned = align.losses(model, align.adopt(own_batch(align, left=True), images, MASKS))
    torch.testing.assert_close(turned.align, ours.align, atol=1e-5, rtol=1e-4)
    assert align.count([batch]) == align.count([expected])


def test_what_follows_the_answer_is_no_prompt(align: Alignment) -> None:
    """As the line end that some chat templates write behind it."""
    batch = own_batch(align)
    shortest = int(batch["attention_mask"].sum(1).argmin())
    end = int(batch["attention_mask"][shortest].sum())
    batch["attention_mask"][shortest, end] = 1
    batch["input_ids"][shortest, end] = align.collate(DATA)["input_ids"][0, -3]
    adopted = align.adopt(batch, [picture(sample) for sample in DATA], MASKS)
    assert torch.equal(adopted["prompt_mask"], align.collate(DATA)["prompt_mask"])


def learnt_throughout(batch: dict[str, Any]) -> None:
    batch["labels"] = batch["input_ids"].clone()


def in_two_turns(batch: dict[str, Any]) -> None:
    first = int(batch["labels"][1].ne(IGNORED).int().argmax())
    batch["labels"][1, first - 2] = 5


def without_labels(batch: dict[str, Any]) -> None:
    del batch["labels"]


def without_tokens(batch: dict[str, Any]) -> None:
    del batch["input_ids"]


def in_lists(batch: dict[str, Any]) -> None:
    batch["labels"] = batch["labels"].tolist()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (learnt_throughout, r"batch\[0\]: labels: expected one answer behind the image .*completion_only_loss"),
        (in_two_turns, r"batch\[1\]: labels: expected one answer .* got 2 stretches"),
        (without_labels, "batch: expected the tensors `input_ids` and `labels` of one shape"),
        (without_tokens, "batch: expected the tensors"),
        (in_lists, "batch: expected the tensors"),
    ],
)
def test_a_batch_that_does_not_say_where_the_answer_is(align: Alignment, spoil: Any, message: str) -> None:
    batch = own_batch(align)
    spoil(batch)
    with pytest.raises(DataError, match=message):
        align.adopt(batch, [picture(sample) for sample in DATA], MASKS)


def test_images_of_a_batch_may_come_in_any_form(align: Alignment) -> None:
    images, batch = [picture(sample) for sample in DATA], own_batch(align)
    expected = align.adopt(batch, images, MASKS)
    same(align.adopt(batch, [np.asarray(image) for image in images], MASKS), expected)
    same(align.adopt(batch, [sample.image for sample in DATA], MASKS), expected)


@pytest.mark.parametrize("name", ["labels", "segments", "pixel_values"])
def test_a_batch_that_lost_something_is_told(align: Alignment, name: str) -> None:
    """Without pixels the model takes the image's tokens for words: another loss, and no word about it."""
    batch = {key: value for key, value in align.collate(DATA).items() if key != name}
    for use in (lambda: align.loss(align.vlm.model, batch), lambda: align.count([batch])):
        with pytest.raises(DataError, match=f"batch: {name}: missing; expected a batch of Alignment.collate"):
            use()


def test_images_that_are_not_those_of_the_batch(align: Alignment) -> None:
    images, batch = [picture(sample) for sample in DATA], own_batch(align)
    with pytest.raises(DataError, match="as many samples, images and entries of regions, got 3, 2 and 3"):
        align.adopt(batch, images[:2], MASKS)
    batch["input_ids"][2][batch["input_ids"][2] == align.vlm.model.config.image_token_id] = 5
    with pytest.raises(DataError, match=rf"batch\[2\]: expected 16 image tokens of one image of {PIXELS} x {PIXELS}"):
        align.adopt(batch, images, MASKS)
