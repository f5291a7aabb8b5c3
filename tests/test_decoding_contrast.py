"""The shared contrast: its formulas, its limits, and beams with two caches."""

from collections.abc import Callable
from math import exp, log
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from a3tune.decoding import generate, make_decoder
from a3tune.decoding.branches import encode_images, noisy
from a3tune.decoding.contrast import Contrast, contrast, cutoff
from a3tune.decoding.loop import Branch, run
from a3tune.decoding.strategy import STRATEGIES, Strategy
from decoders import NEW, Models, batch

BEAMS = Strategy(num_beams=3)
POSITIVE = torch.tensor([[2.0, 1.0, 0.0, -4.0]])
NEGATIVE = torch.tensor([[2.0, 0.0, 3.0, -9.0]])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("zoo"))


def combine(method: str, step: int = 1, **settings: Any) -> Tensor:
    return make_decoder(method, settings).combine(POSITIVE, NEGATIVE, step)  # type: ignore[attr-defined]


def test_the_contrast_by_hand() -> None:
    assert contrast(POSITIVE, NEGATIVE, 1.0).tolist() == [[2.0, 2.0, -3.0, 1.0]]
    assert cutoff(contrast(POSITIVE, NEGATIVE, 1.0), POSITIVE, 0.1).tolist() == [[2.0, 2.0, -3.0, -torch.inf]]
    assert cutoff(POSITIVE, POSITIVE, 0.0) is POSITIVE
    for method, alpha in (("vcd", 1.0), ("avisc", 1.0), ("damro", 0.5)):
        expected = cutoff((1 + alpha) * POSITIVE - alpha * NEGATIVE, POSITIVE, 0.1)
        torch.testing.assert_close(combine(method), expected)


@given(st.floats(0.01, 1.0), st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=9))
def test_the_cutoff_never_takes_the_most_likely_token_and_goes_by_ratio(beta: float, logits: list[float]) -> None:
    positive = torch.tensor([logits])
    kept = cutoff(-positive, positive, beta).isfinite()[0]
    assert kept[positive.argmax()]
    likely = positive[0].double().softmax(-1)
    ratio = likely / likely.max()
    assert all(bool(k) == (float(r) >= beta) for k, r in zip(kept, ratio, strict=True) if abs(float(r) - beta) > 1e-4)


def test_m3id_by_hand() -> None:
    lc, lu = POSITIVE.log_softmax(-1), NEGATIVE.log_softmax(-1)
    weight = (1 - exp(-0.02 * 35)) / exp(-0.02 * 35)
    assert weight == pytest.approx(1.0, abs=0.02)
    torch.testing.assert_close(combine("m3id", 35), cutoff(lc + weight * (lc - lu), lc, 0.1))
    torch.testing.assert_close(combine("m3id", 200, max_weight=2.0), cutoff(lc + 2 * (lc - lu), lc, 0.1))
    # The most likely token has probability .66: the variant "original" leaves a sure model alone.
    torch.testing.assert_close(combine("m3id", 35, variant="original"), lc)
    unsure = combine("m3id", 35, variant="original", confidence=0.9)
    torch.testing.assert_close(unsure, lc + weight * (lc - lu))
    torch.testing.assert_close(combine("m3id", 35, decay=0.0), cutoff(lc, lc, 0.1))


def test_pai_by_hand() -> None:
    lc, lu = POSITIVE.log_softmax(-1), NEGATIVE.log_softmax(-1)
    expected = (1.1 * (lc - lu) + lu).masked_fill(lc < lc.max() + log(0.1), -torch.inf)
    torch.testing.assert_close(combine("pai"), expected)
    torch.testing.assert_close(combine("pai", gamma=1.0, beta=0.0), lc)


NOTHING = [("vcd", {"alpha": 0.0}), ("avisc", {"alpha": 0.0}), ("m3id", {"decay": 0.0}), ("damro", {"alpha": 0.0})]


@pytest.mark.parametrize("strategy", [STRATEGIES["greedy"], BEAMS], ids=["greedy", "beam"])
@pytest.mark.parametrize(("method", "settings"), NOTHING)
def test_no_contrast_is_plain_decoding(method: str, settings: dict, strategy: Strategy, models: Models) -> None:
    vlm = models("llava_clip_224+adapter")
    inputs = batch(vlm)
    found = generate(vlm, inputs, method, strategy=strategy, max_new_tokens=NEW, settings=settings | {"beta": 0.0})
    plain = generate(vlm, inputs, strategy=strategy, max_new_tokens=NEW)
    assert all(torch.equal(one, other) for one, other in zip(found.tokens, plain.tokens, strict=True))


class Cutoff:
    """A scorer with one branch: sampling with the cutoff."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return cutoff(scores, scores, 0.1)

    def reorder(self, beam_B: Tensor) -> None:
        raise AssertionError("no beams here")


def test_a_branch_that_says_the_same_leaves_sampling_with_the_cutoff(models: Models) -> None:
    vlm = models("llava_clip_224")
    inputs, config = batch(vlm), Strategy(do_sample=True, top_k=0, temperature=5.0).config(vlm, NEW)

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    same = Contrast(vlm, inputs, make_decoder("vcd").combine, config)  # type: ignore[attr-defined]
    found = run(vlm, inputs, config, seeded(), scorer=same)
    assert torch.equal(found, run(vlm, inputs, config, seeded(), scorer=Cutoff()))
    assert not torch.equal(found, run(vlm, inputs, config, seeded()))


def best_of_all(vlm, inputs: dict, negative: dict, combine: Callable, beams: int) -> list[int]:
    """Beam search over prefixes as a page of a textbook: every prefix is read from its start, nothing is reordered."""

    def log_probabilities(prefix: list[int]) -> Tensor:
        both = []
        for own in (inputs, negative):
            branch = Branch(vlm, own)
            logits = branch.prefill().logits[:, -1]
            for token in prefix:
                logits = branch.step(torch.tensor([token])).logits[:, -1]
            both.append(logits)
        return combine(*both, len(prefix) + 1).log_softmax(-1)[0]

    alive: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(NEW):
        grown = [
            (score + value, [*prefix, token])
            for score, prefix in alive
            for token, value in enumerate(log_probabilities(prefix).tolist())
        ]
        alive = sorted(grown, reverse=True)[:beams]
    return alive[0][1]


@pytest.mark.parametrize("name", ["llava_clip_224+adapter", "qwen2_5_vl+adapter"])
def test_beams_reorder_both_caches(name: str, models: Models) -> None:
    vlm = models(name)
    settings = {"alpha": 2.0, "beta": 0.01}
    config = BEAMS.config(vlm, NEW)
    config.eos_token_id = None  # the textbook knows no ends
    method: Any = make_decoder("vcd", settings)
    for row in range(3):
        inputs = batch(vlm, [row])
        found = method(vlm, inputs, config, generator=torch.Generator())[0].tolist()
        seed = torch.Generator().initial_seed()
        assert found == best_of_all(vlm, inputs, noisy(inputs, 500, seed), method.combine, 3)


def test_beams_leave_the_encoded_images_as_they_were(models: Models) -> None:
    """transformers repeats them for its beams in the very object that it is given."""
    vlm = models("llava_clip_224")
    encoded = encode_images(vlm, batch(vlm))
    first, again = (run(vlm, encoded, BEAMS.config(vlm, NEW)) for _ in range(2))
    assert len(encoded["mm_encoder_outputs"]["image"].pooler_output) == 3
    assert torch.equal(first, again)


def test_a_scorer_follows_the_beams(models: Models) -> None:
    """What it carries per row moves with the rows: here the tokens it has seen."""
    vlm = models("llava_clip_224")

    class Memory:
        def __init__(self) -> None:
            self.seen: Tensor | None = None
            self.moved = False

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if self.seen is not None:
                assert torch.equal(self.seen, input_ids[:, :-1])
            self.seen = input_ids
            return scores

        def reorder(self, beam_B: Tensor) -> None:
            assert self.seen is not None
            self.moved |= beam_B.tolist() != list(range(len(beam_B)))
            self.seen = self.seen[beam_B]

    memory = Memory()
    run(vlm, batch(vlm), BEAMS.config(vlm, NEW), scorer=memory)
    assert memory.moved
