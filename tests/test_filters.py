import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from a3tune.errors import ConfigError
from a3tune.labels.propose.filters import Filters
from a3tune.labels.propose.superpixels import Superpixels

SIDE = 256


class Plain(Filters):
    name = "plain"


def box(x0, y0, x1, y1):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        (box(50, 50, 62, 90), True),
        (box(50, 50, 61, 90), False),
        (box(1, 1, 201, 200), True),
        (box(1, 1, 202, 202), False),
        (box(0, 50, 40, 90), False),
        (box(50, 0, 90, 40), False),
        (box(220, 50, 256, 90), False),
        (box(50, 220, 90, 256), False),
        (box(1, 50, 40, 90), True),
        (box(0, 0, 0, 0), False),
    ],
)
def test_the_published_filters(mask, kept):
    assert Plain().fit(mask[None]).tolist() == [kept]


def test_what_a_filter_lets_pass_is_a_share_of_the_image():
    masks = np.stack([box(0, 0, 20, 20), box(0, 0, 128, 128)])
    assert Plain(max_frame=1.0, min_side=0.0, min_area=0.01).fit(masks).tolist() == [False, True]
    assert Plain(max_frame=0.2, min_side=0.0).fit(masks).tolist() == [True, False]


@settings(deadline=None)
@given(arrays(bool, (6, 5, 5)), arrays(float, 6, elements=st.integers(0, 3)), st.floats(0, 1), st.integers(1, 6))
def test_of_duplicates_only_the_best_stay(masks, scores, overlap, most):
    masks[:, 0, 0] = True
    kept = Plain(max_overlap=overlap, max_segments=most).distinct(masks, scores)
    expected = []
    for index in sorted(range(6), key=lambda i: (-scores[i], i)):
        ious = [(masks[index] & masks[other]).sum() / (masks[index] | masks[other]).sum() for other in expected]
        if all(iou <= overlap for iou in ious) and len(expected) < most:
            expected.append(index)
    assert kept.tolist() == expected


def test_nothing_in_nothing_out():
    assert Plain().fit(np.zeros((0, 4, 4), bool)).shape == (0,)
    assert Plain().distinct(np.zeros((0, 4, 4), bool), np.zeros(0)).shape == (0,)


@pytest.mark.parametrize("wrong", [{"min_side": "0.1"}, {"max_segments": 2.5}, {"max_segments": True}, {"max_area": 2}])
def test_wrong_settings_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=rf"plain: {name}: expected .* from .*, got {value!r}"):
        Plain(**wrong)


def test_a_proposer_travels_as_its_settings():
    proposer = replace(Superpixels(), max_segments=7)
    assert copy.copy(proposer) == proposer
