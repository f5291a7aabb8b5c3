import pytest

from a3tune.errors import LabelError
from a3tune.labels.quality import Quality, label_quality
from a3tune.masks import box_mask, encode_mask
from a3tune.types import Labels, Region, Sample, Segment

BOXES = {
    "exact": (0.0, 0.0, 4.0, 4.0),
    "half": (0.0, 0.0, 4.0, 2.0),
    "double": (0.0, 0.0, 8.0, 4.0),
    "elsewhere": (12.0, 12.0, 16.0, 16.0),
}
TRUTH = Region(box=BOXES["exact"])


def sample(name, *regions, **meta):
    return Sample(name, b"", "p", "a", "open", regions, meta)


def ranking(*names):
    segments = tuple(Segment(encode_mask(box_mask(BOXES[name], 20, 20))) for name in names)
    return lambda sample: Labels(sample.id, segments, (0.0,) * len(segments))


def quality(names, *, top_k, regions=(TRUTH,), min_iou=0.5):
    return label_quality([sample("1", *regions)], ranking(*names), top_k=top_k, min_iou=min_iou)["all"]


def test_a_perfect_first_segment():
    assert quality(["exact", "elsewhere"], top_k=1) == Quality(1, 1.0, 1.0, 1.0, 1.0, 1.0)


def test_the_ceiling_sees_what_the_ranking_missed():
    assert quality(["elsewhere", "exact"], top_k=1) == Quality(1, 0.0, 0.0, 1.0, 1.0, 0.0)


def test_best_iou_counts_and_precision_is_the_share_of_the_labelled_area():
    assert quality(["half", "elsewhere"], top_k=2) == Quality(1, 1.0, 0.5, 1.0, 0.5, 8 / (8 + 16))
    assert quality(["double"], top_k=4) == Quality(1, 1.0, 0.5, 1.0, 0.5, 0.5)
    assert quality(["half"], top_k=4, min_iou=0.51).recall == 0.0


def test_recall_is_per_region():
    both = (TRUTH, Region(box=BOXES["elsewhere"]))
    assert quality(["exact", "elsewhere"], top_k=1, regions=both) == Quality(1, 0.5, 0.5, 1.0, 1.0, 1.0)


def test_no_segments_count_as_missed():
    assert quality([], top_k=4) == Quality(1, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_samples_without_regions_are_left_out_and_the_rest_is_broken_down():
    known = [
        sample("1", TRUTH, organ="liver"),
        sample("2", Region(box=BOXES["elsewhere"]), organ="lung"),
        sample("3", TRUTH),
    ]
    unknown = [Sample("4", b"", "p", "a", "open", None, {"organ": "liver"}), sample("5", organ="lung")]
    result = label_quality(known + unknown, ranking("exact"), by=["organ"])
    assert {group: (item.samples, item.recall) for group, item in result.items()} == {
        "all": (3, pytest.approx(2 / 3)),
        "organ=liver": (1, 1.0),
        "organ=lung": (1, 0.0),
    }
    assert label_quality(unknown, ranking("exact")) == {}


def test_a_region_that_does_not_fit_is_an_error():
    with pytest.raises(LabelError, match="20 x 20"):
        quality(["exact"], top_k=1, regions=(Region(box=(90.0, 0.0, 99.0, 9.0)),))


def test_a_region_of_two_parts_is_found_part_by_part_or_as_a_whole():
    masks = [box_mask(BOXES[name], 20, 20) for name in ("exact", "elsewhere")]
    both = Region(mask=encode_mask(masks[0] | masks[1]))
    assert quality(["exact", "elsewhere"], top_k=2, regions=(both,)).recall == 1
    assert quality(["exact", "half"], top_k=2, regions=(both,)).recall == 0.5
    whole = label_quality([sample("1", both)], lambda one: Labels(one.id, (Segment(both.mask),), (0.0,)), top_k=1)
    assert (whole["all"].recall, whole["all"].best_iou) == (1, 1)


def test_a_part_that_a_segment_only_touches_is_not_found_with_the_rest_of_the_region():
    large, small = box_mask((0.0, 0.0, 10.0, 10.0), 20, 20), box_mask((12.0, 0.0, 17.0, 4.0), 20, 20)
    touching = large.copy()
    touching[0, 10:13] = True
    both = Region(mask=encode_mask(large | small))
    for segment, recall in ((touching, 0.5), (large | small, 1), (large, 0.5)):
        labels = Labels("1", (Segment(encode_mask(segment)),), (0.0,))
        found = label_quality([sample("1", both)], lambda one, labels=labels: labels)["all"]
        assert (found.recall, found.ceiling_recall) == (recall, recall)


def test_parts_count_where_nothing_was_found():
    parts = Region(mask=encode_mask(box_mask((0, 0, 4, 4), 20, 20) | box_mask((9, 9, 13, 13), 20, 20)))
    there = Labels("2", (Segment(encode_mask(box_mask((0, 0, 4, 4), 20, 20))),), (0.0,))
    pair = [sample("1", parts), sample("2", TRUTH)]
    found = label_quality(pair, lambda one: there if one.id == "2" else Labels("1", (), ()))["all"]
    assert found.recall == pytest.approx(1 / 3)


def test_specks_of_a_region_are_no_parts():
    mask = box_mask((0.0, 0.0, 10.0, 10.0), 20, 20)
    mask[15, 15] = True
    speckled = Region(mask=encode_mask(mask))
    for code, recall in ((speckled.mask, 1), (encode_mask(box_mask((0.0, 0.0, 10.0, 10.0), 20, 20)), 1)):
        ranked = Labels("1", (Segment(code),), (0.0,))
        assert label_quality([sample("1", speckled)], lambda one, found=ranked: found, top_k=1)["all"].recall == recall
