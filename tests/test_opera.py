"""OPERA against a search that reads everything again for each candidate of each beam, on the eager model."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from a3tune.attention.capture import use_capture
from a3tune.decoding import generate
from a3tune.decoding.beams import Beams, largest
from a3tune.decoding.opera import LARGEST_PENALTY, Opera, _Retrospection
from a3tune.decoding.strategy import Strategy
from a3tune.errors import ConfigError, ModelError
from a3tune.vlm.encode import TOKEN_MASKS, encode, prepare
from decoders import PROMPTS, Models, batch, counted_returns, deep_vlm, example, image
from ports.opera import Slow

MODELS = ("llava_clip_224", "llava_clip_224+adapter", "qwen2_5_vl+adapter", "qwen3_vl", "paligemma", "idefics3")
BEAMS = 3
RESTLESS = Opera(scale=1000.0, threshold=1, candidates=3, initial_tokens=1, variant="paper")
"""Goes back soon and often."""
PATIENT = replace(RESTLESS, threshold=3)
"""Goes back later."""
NARROW = replace(RESTLESS, window=3)
"""Leans on the latest three tokens only."""
BOUNDLESS = Opera(scale=1e60, threshold=100, candidates=3, initial_tokens=1, variant="paper")
"""Products of a few weights are beyond any penalty."""
CALM = Opera(scale=100.0, candidates=3, initial_tokens=3, variant="paper")
"""Penalises soon, and never goes back in a short answer."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("zoo"))


@pytest.mark.parametrize(
    ("name", "opera", "longest"),
    [
        *((name, CALM, 5) for name in MODELS),
        ("qwen2_5_vl+adapter", RESTLESS, 8),
        ("qwen2_5_vl+adapter", PATIENT, 12),
        ("qwen2_5_vl+adapter", NARROW, 8),
        ("qwen2_5_vl+adapter", BOUNDLESS, 6),
        *((name, replace(CALM, variant="code"), 5) for name in MODELS),
        *(("qwen2_5_vl+adapter", replace(opera, variant="code"), 12) for opera in (RESTLESS, PATIENT)),
    ],
)
def test_answers_are_those_of_the_slow_search(name: str, opera: Opera, longest: int, models: Models) -> None:
    vlm, returns = models(name), 0
    strategy = Strategy(num_beams=BEAMS)
    ends: Any = strategy.config(vlm, longest).eos_token_id
    with counted_returns() as counts:
        found = generate(vlm, batch(vlm, [0, 1]), opera, strategy=strategy, max_new_tokens=longest).tokens
    vlm.model.set_attn_implementation({"text_config": "eager"})
    for row, tokens in enumerate(found):
        slow = Slow(vlm, example(vlm, row), BEAMS)
        search = slow.search_as_published if opera.variant == "code" else slow.search
        assert tokens.tolist() == search(opera, ends, longest)
        assert counts[row] == slow.returns
        returns += slow.returns
    use_capture(vlm.model)
    assert (returns > 0) == (replace(opera, variant="paper") in (RESTLESS, PATIENT, NARROW))


@pytest.mark.parametrize("name", ["llava_clip_224+adapter", "qwen3_vl", "idefics3+adapter"])
def test_a_padded_batch_gives_what_its_samples_give_alone(name: str, models: Models) -> None:
    vlm = models(name)
    together = generate(vlm, batch(vlm, [0, 1]), RESTLESS, max_new_tokens=6).tokens
    for row, tokens in enumerate(together):
        alone = generate(vlm, batch(vlm, [row]), RESTLESS, max_new_tokens=6).tokens[0]
        assert torch.equal(tokens, alone)


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_going_back_in_a_batch_of_different_prompts_gives_what_each_gives_alone(variant: Any) -> None:
    """Some go back and some do not, at steps of their own; and with fewer candidates than beams some choices are among
    tokens of equal scores."""
    vlm = deep_vlm(layers=4, hidden=64)
    vlm.model.double()
    opera = Opera(scale=200.0, threshold=2, candidates=3, initial_tokens=1, variant=variant)
    longest, strategy, texts = 12, Strategy(num_beams=5), [" ".join(PROMPTS[: 1 + row % 3]) for row in range(4)]

    def answers(rows: list[int]) -> tuple[list[list[int]], list[int]]:
        encoded = encode(vlm, [image(row) for row in rows], [texts[row] for row in rows], padding_side="left")
        inputs = {name: value for name, value in encoded.items() if name not in TOKEN_MASKS}
        with counted_returns() as counts:
            found = generate(vlm, inputs, opera, strategy=strategy, max_new_tokens=longest).tokens
        return [tokens.tolist() for tokens in found], counts

    together, counts = answers([0, 1, 2, 3])
    alone = [answers([row]) for row in range(4)]
    assert together == [tokens for (tokens,), _ in alone]
    assert counts == [count for _, (count,) in alone]
    assert len(set(counts)) > 1
    row = counts.index(min(count for count in counts if count))
    vlm.model.set_attn_implementation({"text_config": "eager"})
    slow = Slow(vlm, prepare(vlm, [image(row)], texts[row]), 5)
    ends: Any = strategy.config(vlm, longest).eos_token_id
    search = slow.search_as_published if variant == "code" else slow.search
    assert (search(opera, ends, longest), slow.returns) == (together[row], counts[row])


def test_of_equal_scores_the_first_are_chosen() -> None:
    scores = torch.full((3200,), -999.0)
    scores[[7, 2000]] = torch.tensor([-1000.0, 3.0])
    found, places = largest(scores, 12)
    assert places.tolist() == [2000, 0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert torch.equal(found, scores[places])


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_answers_found_since_a_return_stay_at_the_next_one_as_published(variant: Any) -> None:
    retrospection = _Retrospection(Opera(threshold=2, initial_tokens=1, candidates=2, variant=variant))
    leant, ended = torch.ones(1, 2, dtype=torch.long), (-1.0, torch.tensor([5, 3]))

    def state(length: int, *finished: tuple[float, Tensor]) -> Beams:
        one = torch.zeros(1, dtype=torch.long)
        tokens_BS = torch.zeros(1, length, dtype=torch.long)
        return Beams(tokens_BS, torch.zeros(1), torch.zeros(1, length), one, one, finished, done=False)

    assert [retrospection.check(state(length), leant) for length in range(3)] == [None] * 3
    for finished in ((), (ended,) if variant == "code" else ()):
        back = retrospection.check(state(3, ended), leant)
        assert back is not None
        assert back[0].tokens_BS.shape[1] == 2
        assert back[0].finished == finished


@pytest.mark.parametrize("beams", [1, 3])
def test_without_a_penalty_and_with_every_candidate_it_is_plain_beam_search(beams: int, models: Models) -> None:
    vlm = models("qwen2_5_vl+adapter")
    inputs, strategy = batch(vlm, [0, 1]), Strategy(num_beams=beams)
    opera = Opera(penalty=0.0, candidates=vlm.model.config.text_config.vocab_size, variant="paper")
    found = generate(vlm, inputs, opera, strategy=strategy, max_new_tokens=4).tokens
    plain = generate(vlm, inputs, "beam", strategy=strategy, max_new_tokens=4).tokens
    assert [tokens.tolist() for tokens in found] == [tokens.tolist() for tokens in plain]


def test_over_trust_is_the_largest_product_down_a_column() -> None:
    random = torch.Generator().manual_seed(0)
    opera, prompt, answer = Opera(initial_tokens=1, scale=30.0, penalty=2.0, variant="paper"), 7, 5
    rows = torch.rand(2, answer + 3, prompt + answer + 1, generator=random).softmax(-1)
    drawn_BSS = rows[:, :answer, prompt : prompt + answer].double() * opera.scale
    columns = [torch.stack([one[j:, j].prod() for j in range(answer)]) for one in drawn_BSS]
    products = torch.stack(columns).log().float()
    penalty, place = opera.over_trust(rows[:, answer:], products, torch.arange(3))
    for beam in range(2):
        for candidate in range(3):
            square = torch.stack([*rows[beam, :answer], rows[beam, answer + candidate]])[:, prompt:].double() * 30
            columns = torch.stack([square[j:, j].prod() for j in range(answer + 1)])
            assert int(place[beam, candidate]) == int(columns.argmax())
            assert float(penalty[beam, candidate]) == pytest.approx(2e-7 * float(columns.max()), rel=1e-4)
    narrow, latest = Opera(initial_tokens=1, scale=30.0, window=2, variant="paper").over_trust(
        rows[:, answer:], products, torch.arange(3)
    )
    assert latest.min() >= answer - 1
    assert (narrow <= penalty).all()
    drawn, _ = Opera().over_trust(rows[:, answer:], products, torch.arange(3))
    torch.testing.assert_close(drawn, -rows[:, answer:, :3].sum(-1))


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_a_boundless_product_stays_a_penalty(variant: Any) -> None:
    penalty, _ = Opera(initial_tokens=1, variant=variant).over_trust(
        torch.full((1, 2, 60), 0.9), torch.full((1, 50), 300.0), torch.arange(3)
    )
    assert penalty.tolist() == [[LARGEST_PENALTY[variant]] * 2]


def test_published_penalties_have_16_bits_and_small_ones_lean_on_nothing() -> None:
    rows, products = torch.full((1, 1, 5), 0.2), torch.tensor([[0.0, log(1.2), -30.0]])
    opera = Opera(initial_tokens=1, scale=1.0)
    small, place = opera.over_trust(rows, products, torch.arange(1))
    assert (float(small), int(place)) == (0.0, 0), "1e-7 * .24 is less than half of the smallest number of 16 bits"
    exact, place = replace(opera, variant="paper").over_trust(rows, products, torch.arange(1))
    assert (float(exact), int(place)) == (pytest.approx(2.4e-8), 1)


@pytest.fixture
def search(models: Models, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[tuple[int, int]]]]:
    """Searches with one beam where all is given: `search(opera, leant)` are the choices in their order, each as its
    place in the answer and its rank among the tokens. The model likes the same tokens everywhere, and all candidates of
    step i (from 0) lean on the token at place `leant(i)`.
    """
    vlm, best, lengths, ranks = models("qwen2_5_vl"), 20, [], []

    def rank(model: Any, args: Any, output: Any) -> None:
        output.logits[:] = -torch.arange(output.logits.shape[-1]).roll(best).float()

    def note(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            ranks.append(int(kwargs["input_ids"]) - best)

    def search(opera: Opera, leant: Callable[[int], int]) -> list[tuple[int, int]]:
        def lean(self: Opera, rows_BCT: Tensor, products_BS: Tensor, image_N: Tensor) -> tuple[Tensor, Tensor]:
            lengths.append(products_BS.shape[1])
            none = torch.zeros(rows_BCT.shape[:2])
            return none, none.long() + leant(len(lengths) - 1)

        monkeypatch.setattr(Opera, "over_trust", lean)
        (answer,) = generate(vlm, batch(vlm, [0]), opera, strategy="greedy", max_new_tokens=16).tokens
        assert len(answer) == 16
        return [(after - 1, rank) for after, rank in zip(lengths[1:], ranks, strict=True)]

    hooks = [vlm.model.register_forward_hook(rank), vlm.model.register_forward_pre_hook(note, with_kwargs=True)]
    yield search
    for hook in hooks:
        hook.remove()


def test_going_back_takes_more_steps_than_the_threshold(search) -> None:
    choices = search(Opera(threshold=6, candidates=2, initial_tokens=2), lambda step: 2)
    assert choices[:8] == [*((place, 0) for place in range(6)), (3, 1), (4, 0)]


def test_going_back_is_given_up_when_a_place_was_tried_often_enough(search) -> None:
    """As often as there are candidates to each of two steps, never to the same choice: an answer always ends."""
    choices = search(Opera(threshold=3, candidates=2, initial_tokens=2), lambda step: 2)
    assert choices[:4] == [(place, 0) for place in range(4)]
    assert choices[4:8] == [(3, 1), (3, 2), (2, 1), (2, 2)]
    assert choices[8:] == [(place, 0) for place in range(3, 15)]


def test_what_was_tried_behind_another_token_may_be_chosen_again(search) -> None:
    choices = search(
        Opera(threshold=3, candidates=3, initial_tokens=1), lambda step: 1 if 6 <= step < 10 else 2 if step < 12 else 0
    )
    assert choices[4:6] == [(3, 1), (3, 2)]
    assert choices[6:9] == [(4, 0), (5, 0), (6, 0)]
    assert choices[9:12] == [(2, 1), (3, 0), (3, 1)]


def test_the_first_tokens_are_never_gone_back_to(search) -> None:
    choices = search(Opera(threshold=1, candidates=2, initial_tokens=3), lambda step: 2)
    assert choices == [(place, 0) for place in range(15)]


@pytest.mark.parametrize("name", ["llava_clip_224+adapter", "qwen3_vl", "paligemma", "idefics3"])
def test_candidates_look_where_each_would_if_it_were_read_alone(
    name: str, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, seen, opera = models(name), [], Opera(penalty=0.0, candidates=4)
    judge = Opera.over_trust
    monkeypatch.setattr(Opera, "over_trust", lambda self, rows, *rest: seen.append(rows[0]) or judge(self, rows, *rest))
    inputs = batch(vlm, [1, 0])
    found = generate(vlm, inputs, opera, strategy="greedy", max_new_tokens=4).tokens
    of_sample = [seen[: len(found[0])], seen[len(found[0]) :]]
    vlm.model.set_attn_implementation({"text_config": "eager"})
    for row, sample in enumerate((1, 0)):
        slow, answer = Slow(vlm, example(vlm, sample), BEAMS), found[row].tolist()
        padding = int((inputs["attention_mask"][row] == 0).sum())
        for step, rows_CT in enumerate(of_sample[row]):
            candidates = slow.likely(answer[:step], opera.candidates)
            assert candidates[0] == answer[step]
            expected = torch.stack([slow.look([*answer[:step], token])[1][-1] for token in candidates])
            torch.testing.assert_close(rows_CT[:, padding:], expected, atol=1e-6, rtol=1e-4)
            assert rows_CT[:, :padding].eq(0).all() and (expected[0] - expected).abs().max() > 1e-3
    use_capture(vlm.model)


def test_what_it_cannot_do_it_says(models: Models) -> None:
    vlm = models("llava_clip_224")
    with pytest.raises(ConfigError, match="cannot sample"):
        generate(vlm, batch(vlm), "opera", strategy="sampling")
    windows = models("gemma3")
    with pytest.raises(ModelError, match="sliding window of 12"):
        generate(windows, batch(windows), "opera")
    vlm.model.set_attn_implementation({"text_config": "sdpa"})
    with pytest.raises(ModelError, match="attention=True"):
        generate(vlm, batch(vlm), "opera")
    use_capture(vlm.model)


def test_a_window_that_is_wide_enough_changes_nothing(models: Models) -> None:
    """LLaVA-NeXT's Mistral has windows of 4,096 positions; its answers are those of the same model without."""
    vlm = models("llava_next")
    config: Any = vlm.model.config.text_config
    found = generate(vlm, batch(vlm), RESTLESS, max_new_tokens=5).tokens
    window, config.sliding_window = config.sliding_window, None
    assert [tokens.tolist() for tokens in generate(vlm, batch(vlm), RESTLESS, max_new_tokens=5).tokens] == [
        tokens.tolist() for tokens in found
    ]
    config.sliding_window = window
