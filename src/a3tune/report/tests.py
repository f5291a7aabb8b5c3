"""Right answers test by test (`meta.test` of the questions), each run beside the reference. Loads no model."""

from collections.abc import Mapping, Sequence

import numpy as np

from a3tune.evaluation.results import classes, clusters, named_tests
from a3tune.metrics.catalogue import right
from a3tune.metrics.stats import holm, mean_interval, paired_difference, paired_permutation_test
from a3tune.report.records import Comparison, RightAnswers
from a3tune.types import Prediction, Sample


def right_by_test(
    runs: Mapping[str, Sequence[Prediction]], samples: Sequence[Sample], reference: str
) -> dict[str, dict[str, RightAnswers]]:
    """Test -> run -> what it got right; no tests where the questions name none.

    `runs` has the answers to `samples`, in their order. Intervals resample patients or images, as everywhere; p-values
    are adjusted over all runs and tests (Holm).
    """
    groups = clusters(samples)
    shares = {name: np.array([right(one) for one in predictions], dtype=float) for name, predictions in runs.items()}
    chosen_of, named = classes(samples, "test"), named_tests(sample.meta for sample in samples)
    parts = {
        test: ([groups[i] for i in chosen_of[test]], {name: own[chosen_of[test]] for name, own in shares.items()})
        for test in named
    }
    p_of = {
        (test, name): paired_permutation_test(own[name], own[reference], part)
        for test, (part, own) in parts.items()
        for name in runs
        if name != reference
    }
    comparisons = {
        (test, name): Comparison(paired_difference(own[name], own[reference], part), float(p))
        for ((test, name), p) in zip(p_of, holm(list(p_of.values())), strict=True)
        for part, own in [parts[test]]
    }
    return {
        test: {name: RightAnswers(mean_interval(own[name], part), comparisons.get((test, name))) for name in runs}
        for test, (part, own) in parts.items()
    }
