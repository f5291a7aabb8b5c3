"""Cases are drawn by rule: localised, stratified, reproducible, blind to answers but for the lost and the won."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from a3tune.report.cases import select_cases
from a3tune.types import Prediction

BODIES = ("abdomen", "brain", "chest")


def _predictions(right: dict[int, bool], *, count: int = 30) -> list[Prediction]:
    return [
        Prediction(
            f"q{i}", "p?", "cyst", "open", "cyst" if right.get(i, True) else "mass", {"body": BODIES[i % 3]},
            {"attention_mass": 0.2 if i % 5 else float("nan")},
        )
        for i in range(count)
    ]  # fmt: skip


def test_every_stratum_the_won_and_the_lost_are_shown() -> None:
    own, other = _predictions(dict.fromkeys(range(1, 9), False)), _predictions(dict.fromkeys(range(15, 30), False))
    chosen = select_cases({"a3tune": own, "lora": other}, per_stratum=2, each=3)
    by_id = {p.id: p for p in own}
    won, drawn, lost = chosen.choices[:3], chosen.choices[3:9], chosen.choices[9:]
    assert all("won" in c.reason for c in won) and all("lost" in c.reason for c in lost)
    assert Counter(by_id[c.id].meta["body"] for c in drawn) == dict.fromkeys(BODIES, 2)
    assert all(int(c.id[1:]) >= 15 for c in won)
    assert len(lost) == 3 and all(by_id[c.id].prediction == "mass" for c in lost)
    assert len({c.id for c in chosen.choices}) == len(chosen.choices)
    assert not any(by_id[c.id].attention["attention_mass"] != 0.2 for c in chosen.choices)
    # 24 of 30 are localised; of the 8 wrong ones, q5 is not.
    assert "24 test questions" in chosen.rule and "7 of 24" in chosen.rule and "seed of the draw is 0" in chosen.rule


@pytest.mark.parametrize("seed", range(5))
def test_order_of_predictions_does_not_matter(seed: int) -> None:
    order = np.random.default_rng(seed).permutation(30)
    own, other = _predictions({1: False, 7: False}), _predictions({2: False})
    plain = select_cases({"a3tune": own, "lora": other}, seed=seed)
    assert select_cases({"a3tune": [own[i] for i in order], "lora": other}, seed=seed) == plain


def test_won_and_lost_are_of_the_first_test_where_questions_name_tests() -> None:
    def of(tests: int, right: dict[int, bool]) -> list[Prediction]:
        return [replace(p, meta={**p.meta, "test": f"t{i % tests}"}) for i, p in enumerate(_predictions(right))]

    wrong = dict.fromkeys(range(30), False)
    won = {c.id for c in select_cases({"a3tune": of(2, {}), "lora": of(2, wrong)}).choices if "won" in c.reason}
    assert len(won) == 3 and all(int(i[1:]) % 2 == 1 for i in won), "the first with an attention is q1, of t1"
    many = select_cases({"a3tune": of(30, {}), "lora": of(30, wrong)})
    assert sum("won" in choice.reason for choice in many.choices) == 3 and "in the test" not in many.rule


def test_random_draw_is_blind_to_answers() -> None:
    other = _predictions({})
    good = select_cases({"a3tune": _predictions({}), "lora": other}, each=0)
    bad = select_cases({"a3tune": _predictions(dict.fromkeys(range(30), False)), "lora": other}, each=0)
    assert good.choices == bad.choices
    assert select_cases({"a3tune": other, "lora": other}, each=0, seed=1).choices != good.choices


def test_fewer_questions_than_asked_for_and_no_stratum() -> None:
    few = [replace(p, meta={}) for p in _predictions({}, count=2)]
    chosen = select_cases({"a3tune": few, "lora": few})
    assert [c.id for c in chosen.choices] == ["q1"] and chosen.choices[0].reason == "random"
    assert select_cases({"a3tune": [], "lora": []}).choices == ()


def test_a_report_is_neither_won_nor_lost() -> None:
    own, other = (
        [replace(p, answer_type="report") for p in _predictions(dict.fromkeys(range(30), right))]
        for right in (True, False)
    )
    chosen = select_cases({"a3tune": own, "lora": other})
    assert chosen.choices and all(c.reason.startswith("random, ") for c in chosen.choices)
