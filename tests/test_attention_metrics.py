import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from a3tune.errors import ConfigError
from a3tune.metrics.attention import (
    attention_mass,
    coverage,
    intensity,
    normalise,
    patch_auroc,
    pointing,
)
from a3tune.metrics.catalogue import attention_metrics

MAP = np.array([[0.4, 0.04, 0.08, 0.0]])
REGION = np.array([[1, 1, 0, 0]])


def test_by_hand():
    # Divided by the largest: 1, .1, .2, 0.
    np.testing.assert_allclose(coverage(MAP, REGION), 0.5)
    np.testing.assert_allclose(coverage(MAP, REGION, tau=0.09), 1.0)
    np.testing.assert_allclose(intensity(MAP, REGION), (1 + 0.1) / 2)
    np.testing.assert_allclose(attention_mass(MAP, REGION), 0.44 / 0.52)
    np.testing.assert_allclose(pointing(MAP, REGION), 1.0)
    # Pairs (inside, outside): .4 beats both, .04 beats 0 only.
    np.testing.assert_allclose(patch_auroc(MAP, REGION), 3 / 4)


def test_normalisations_by_hand():
    values = np.array([[2.0, 4.0, 6.0]])
    np.testing.assert_allclose(normalise(values, "max"), [[1 / 3, 2 / 3, 1]])
    np.testing.assert_allclose(normalise(values, "sum"), [[1 / 6, 1 / 3, 1 / 2]])
    np.testing.assert_allclose(normalise(values, "min-max"), [[0, 0.5, 1]])
    region = np.array([[0, 1, 0]])
    np.testing.assert_allclose(intensity(values, region, normalisation="sum"), 1 / 3)
    np.testing.assert_allclose(coverage(values, region, tau=0.5, normalisation="min-max"), 1.0)
    np.testing.assert_allclose(coverage(values, region, tau=0.5, normalisation="sum"), 0.0)
    with pytest.raises(ConfigError, match="normalisation"):
        normalise(values, "softmax")  # pyright: ignore[reportArgumentType]


def test_undefined_is_nan_and_only_there():
    maps = np.array([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [1.0, 2.0]])
    regions = np.array([[0, 0], [0, 1], [0, 1], [1, 1]])
    for name, values in attention_metrics(maps, regions).items():
        nan = [True, False, True, name == "patch_auroc"]
        assert np.isnan(values).tolist() == nan, name
    assert np.isnan(intensity([[3.0, 3.0]], [[1, 0]], normalisation="min-max")).all()
    assert np.isnan(coverage([[3.0, 3.0]], [[1, 0]], normalisation="min-max")).all()


def test_ties_are_shared():
    np.testing.assert_allclose(pointing([[1.0, 1.0, 0.5, 1.0]], [[1, 0, 0, 1]]), 2 / 3)
    np.testing.assert_allclose(patch_auroc([[1.0, 1.0, 1.0]], [[1, 0, 0]]), 0.5)


def test_takes_tensors_and_refuses_other_shapes():
    found = intensity(torch.tensor(MAP, dtype=torch.float32), torch.tensor(REGION, dtype=torch.bool))
    np.testing.assert_allclose(found, 0.55, rtol=1e-6)
    with pytest.raises(ValueError, match="shape"):
        intensity(MAP, REGION[:, :2])
    with pytest.raises(ValueError, match="shape"):
        intensity(MAP[0], REGION[0])


@st.composite
def maps_and_regions(draw):
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 9)))
    maps = draw(arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 3.0])))
    return maps, draw(arrays(np.bool_, shape))


@given(maps_and_regions(), st.floats(0.01, 100), st.sampled_from(["max", "sum", "min-max"]), st.randoms())
def test_properties(case, scale, normalisation, random):
    maps, regions = case
    found = attention_metrics(maps, regions, normalisation=normalisation)
    for values in found.values():
        assert ((values >= 0) & (values <= 1 + 1e-12) | np.isnan(values)).all()
    order = random.sample(range(maps.shape[1]), maps.shape[1])
    shuffled = attention_metrics(maps[:, order], regions[:, order], normalisation=normalisation)
    for name, values in found.items():
        np.testing.assert_allclose(shuffled[name], values, err_msg=name)
    for name in ("attention_mass", "pointing", "patch_auroc"):
        np.testing.assert_allclose(attention_metrics(maps * scale, regions)[name], found[name], err_msg=name)
    outside = attention_metrics(maps, ~regions)
    for name in ("attention_mass", "pointing", "patch_auroc"):
        both = ~np.isnan(found[name]) & ~np.isnan(outside[name])
        np.testing.assert_allclose((found[name] + outside[name])[both], 1, err_msg=name)


@given(maps_and_regions())
def test_auroc_is_the_share_of_won_pairs(case):
    for row, region, value in zip(*case, patch_auroc(*case), strict=True):
        pairs = [(a > b) + (a == b) / 2 for a in row[region] for b in row[~region]]
        if pairs and row.any():
            assert value == pytest.approx(np.mean(pairs))
        else:
            assert np.isnan(value)
