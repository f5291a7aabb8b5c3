"""OPERA against a search that reads everything again for each candidate of each beam, on the eager model."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from a3tune.adapters import Routing
from a3tune.attention.capture import use_capture
from a3tune.compat.generation import ENCODED
from a3tune.decoding import generate
from a3tune.decoding.branches import encode_images
from a3tune.decoding.opera import LARGEST_PENALTY, Opera
from a3tune.decoding.strategy import Strategy, placeholders
from a3tune.errors import ConfigError, ModelError
from a3tune.vlm.encode import TOKEN_MASKS, Example, pad
from a3tune.vlm.load import Vlm
from decoders import Models, batch, example

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


class Slow:
    """One sample; every pass reads everything on the eager model, without a cache."""

    def __init__(self, vlm: Vlm, asked: Example) -> None:
        self.vlm, self.asked = vlm, asked
        self.read: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self.returns = 0
        inputs = dict(pad(vlm, [asked], "right"))
        self.images = {ENCODED: encode_images(vlm, {k: v for k, v in inputs.items() if k not in TOKEN_MASKS})[ENCODED]}

    def look(self, answer: list[int]) -> tuple[Tensor, Tensor]:
        """Logits after the answer `[V]`, and the last layer's attention `[S, S]`: largest head, rows sum to 1."""
        if tuple(answer) not in self.read:
            of = replace(
                self.asked, input_ids=torch.cat([self.asked.input_ids, torch.tensor(answer, dtype=torch.long)])
            )
            inputs: dict[str, Any] = dict(pad(self.vlm, [of], "right"))
            masks = {name: inputs.pop(name) for name in TOKEN_MASKS}
            inputs.pop("labels", None)
            routing = {"routing": Routing(masks["prompt_mask"], masks["image_mask"])}
            forward = routing if hasattr(self.vlm.model, "peft_config") else {}
            inputs = {**{name: value for name, value in inputs.items() if name != "pixel_values"}, **self.images}
            with torch.no_grad():
                out = self.vlm.model(**inputs, **forward, use_cache=False, output_attentions=True)
            attention = out.attentions[-1][0].amax(0)
            self.read[tuple(answer)] = out.logits[0, -1].float(), attention / attention.sum(-1, keepdim=True)
        return self.read[tuple(answer)]

    def allowed(self, answer: list[int]) -> Tensor:
        """Logits after the answer, without the tokens that no answer may hold."""
        return self.look(answer)[0].index_fill(0, torch.tensor(placeholders(self.vlm)), -torch.inf)

    def likely(self, answer: list[int], count: int) -> list[int]:
        return self.allowed(answer).topk(count).indices.tolist()

    def offer(self, opera: Opera, answer: list[int]) -> tuple[Tensor, int]:
        """Scores of the next token, and the place in the answer that most candidates lean on."""
        start, image = len(self.asked.input_ids), self.asked.input_ids == self.vlm.model.config.image_token_id
        logits, places = self.allowed(answer), []
        scores = torch.full_like(logits, -999.0)
        for token in self.likely(answer, opera.candidates):
            attention = self.look([*answer, token])[1]
            scaled = opera.scale * attention[start:, start:].double()
            columns = 1e-7 * torch.stack([scaled[j:, j].prod() for j in range(len(scaled))])
            columns = (columns.half() if opera.variant == "code" else columns)[-opera.window :]
            places.append(int(columns.float().argmax()) + len(scaled) - len(columns))
            trust = -attention[-1, :start][image].sum() if len(scaled) <= opera.initial_tokens else columns.max()
            scores[token] = logits[token] - (opera.penalty * trust).clamp(max=LARGEST_PENALTY[opera.variant])
        return scores, mode(places)

    def search_as_published(self, opera: Opera, ends: list[int], longest: int) -> list[int]:
        """The best answer by the published loop and the beam scorer of transformers 4.29, which it was made for."""
        image = self.asked.input_ids == self.vlm.model.config.image_token_id
        prompt = len(image) - int((image[1:] & image[:-1]).sum())
        beams: list[tuple[float, list[int]]] = [(0.0, []), *[(-1e9, [])] * (BEAMS - 1)]
        heap: list[tuple[float, list[int]]] = []
        history, leant, chosen, rejected, tries = [], [], {}, {}, Counter()
        while True:
            step = len(beams[0][1])
            history.append((beams, list(heap)))
            rows, places = zip(*(self.offer(opera, answer) for _, answer in beams), strict=True)
            leant.append(places)
            place = mode(list(places))
            if place >= opera.initial_tokens and all(
                sum(past[beam] == place for past in leant) > opera.threshold for beam in range(BEAMS)
            ):
                back = next((at for at in (place + 1, place) if tries[at] < opera.candidates), None)
                if back is not None and back < step:
                    self.returns += 1
                    tries[back] += 1
                    history, leant, step = history[: back + 1], leant[: back + 1], back
                    beams, heap = history[back][0], list(history[back][1])
                    rejected.pop(back + 1, None)
                    rejected[back] = rejected.get(back, []) + chosen[back]
                    rows = [self.allowed(answer) for _, answer in beams]
                    for beam, token in rejected[back]:
                        rows[beam][token] = self.allowed(beams[beam][1]).masked_fill(rows[beam].isneginf(), 1e9).min()
            total = torch.stack([row.log_softmax(-1) + score for (score, _), row in zip(beams, rows, strict=True)])
            score, at = total.flatten().topk((1 + len(ends)) * BEAMS)
            going = []
            for rank, (value, place) in enumerate(zip(score.tolist(), at.tolist(), strict=True)):
                beam, token = divmod(place, total.shape[1])
                if token not in ends:
                    going.append((value, beam, token))
                elif rank < BEAMS:
                    self.add(heap, value / (prompt + step), [*beams[beam][1], token])
                if len(going) == BEAMS:
                    break
            chosen[step] = [(beam, token) for _, beam, token in going]
            beams = [(value, [*beams[beam][1], token]) for value, beam, token in going]
            done = len(heap) == BEAMS and heap[-1][0] >= float(score[0]) / (prompt + step + 1)
            if done or step + 1 == longest:
                for value, answer in () if done else beams:
                    self.add(heap, value / (prompt + step + 1), answer)
                return heap[0][1]

    @staticmethod
    def add(heap: list[tuple[float, list[int]]], score: float, answer: list[int]) -> None:
        heap.append((score, answer))
        heap.sort(key=lambda one: -one[0])
        del heap[BEAMS:]

    def search(self, opera: Opera, ends: list[int], longest: int) -> list[int]:
        """The best answer. A beam is (score, answer)."""
        beams: list[tuple[float, list[int]]] = [(0.0, []), *[(-1e9, [])] * (BEAMS - 1)]
        ended: list[tuple[float, list[int]]] = []
        states, leant, chosen = [], [], []
        tries, forbidden = Counter(), {}
        while True:
            step = len(beams[0][1])
            states.append((beams, ended))
            rows, places = zip(*(self.offer(opera, answer) for _, answer in beams), strict=True)
            leant.append(places)
            place = mode(list(places))
            often = all(sum(past[beam] == place for past in leant) > opera.threshold for beam in range(BEAMS))
            back = next((at for at in (place + 1, place) if tries[at] < opera.candidates), step)
            if place >= opera.initial_tokens and back < step and often:
                self.returns += 1
                tries[back] += 1
                forbidden = {at: pairs for at, pairs in forbidden.items() if at <= back}
                forbidden[back] = forbidden.get(back, []) + chosen[back]
                states, leant, chosen, step = states[: back + 1], leant[: back + 1], chosen[:back], back
                beams, ended = states[back]
                rows = [self.allowed(answer) for _, answer in beams]
                for beam, token in forbidden[back]:
                    rows[beam][token] = -torch.inf
            total = torch.stack([row.log_softmax(-1) + score for (score, _), row in zip(beams, rows, strict=True)])
            best = total.flatten().topk((1 + len(ends)) * BEAMS)
            offers = [(float(score), *divmod(int(at), total.shape[1])) for score, at in zip(*best, strict=True)]
            over = [token in ends or step + 1 == longest for _, _, token in offers]
            for (score, beam, token), end in list(zip(offers, over, strict=True))[:BEAMS]:
                ended = [*ended, (score / (step + 1), [*beams[beam][1], token])] if end else ended
            ended = sorted(ended, key=lambda one: -one[0])[:BEAMS]
            going = [offer for offer, end in zip(offers, over, strict=True) if not end][:BEAMS]
            if not going or (len(ended) == BEAMS and going[0][0] / (step + 1) <= ended[-1][0]):
                return ended[0][1]
            chosen.append([(beam, token) for _, beam, token in going])
            beams = [(score, [*beams[beam][1], token]) for score, beam, token in going]


def mode(values: list[int]) -> int:
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


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
    found = generate(vlm, batch(vlm, [0, 1]), opera, strategy=strategy, max_new_tokens=longest).tokens
    vlm.model.set_attn_implementation({"text_config": "eager"})
    for row, tokens in enumerate(found):
        slow = Slow(vlm, example(vlm, row))
        search = slow.search_as_published if opera.variant == "code" else slow.search
        assert tokens.tolist() == search(opera, ends, longest)
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
        slow, answer = Slow(vlm, example(vlm, sample)), found[row].tolist()
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
