"""OPERA against a search that reads everything again for each candidate of each beam, on the eager model."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from a3tune.adapters import Routing
from a3tune.attention.capture import use_capture
from a3tune.compat.generation import ENCODED
from a3tune.decoding import generate
from a3tune.decoding.branches import encode_images
from a3tune.decoding.loop import Branch
from a3tune.decoding.opera import LARGEST_PENALTY, Opera, _Beams, _positions, _Reader, _Retrospection
from a3tune.decoding.strategy import Strategy
from a3tune.errors import ConfigError, ModelError
from a3tune.vlm.encode import TOKEN_MASKS, Example, pad
from a3tune.vlm.load import Vlm
from decoders import Models, batch, example

MODELS = ("llava_clip_224", "qwen2_5_vl+adapter", "paligemma")
BEAMS = 3
RESTLESS = Opera(scale=1000.0, threshold=1, candidates=3, initial_tokens=1)
"""Goes back soon and often."""
CALM = Opera(scale=100.0, candidates=3, initial_tokens=3)
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

    def offer(self, opera: Opera, answer: list[int]) -> tuple[Tensor, int]:
        """Scores of the next token, and the place in the answer that most candidates lean on."""
        start, image = len(self.asked.input_ids), self.asked.input_ids == self.vlm.model.config.image_token_id
        logits, places = self.look(answer)[0], []
        scores = torch.full_like(logits, -999.0)
        for token in logits.topk(opera.candidates).indices.tolist():
            attention = self.look([*answer, token])[1]
            scaled = opera.scale * attention[start:, start:].double()
            columns = torch.stack([scaled[j:, j].prod() for j in range(len(scaled))])
            places.append(int(columns.argmax()))
            trust = -attention[-1, :start][image].sum() if len(scaled) <= opera.initial_tokens else 1e-7 * columns.max()
            scores[token] = logits[token] - (opera.penalty * trust).clamp(max=LARGEST_PENALTY)
        return scores, mode(places)

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
            often = (sum(past[beam] == place for past in leant) > opera.threshold for beam in range(BEAMS))
            back = next((at for at in (place + 1, place) if tries[at] < opera.candidates), step)
            if place >= opera.initial_tokens and back < step and all(often):
                self.returns += 1
                tries[back] += 1
                forbidden = {at: pairs for at, pairs in forbidden.items() if at <= back}
                forbidden[back] = forbidden.get(back, []) + chosen[back]
                states, leant, chosen, step = states[: back + 1], leant[: back + 1], chosen[:back], back
                beams, ended = states[back]
                rows = [self.look(answer)[0].clone() for _, answer in beams]
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
    ("name", "opera", "longest"), [*((name, CALM, 5) for name in MODELS), ("qwen2_5_vl+adapter", RESTLESS, 8)]
)
def test_answers_are_those_of_the_slow_search(name: str, opera: Opera, longest: int, models: Models) -> None:
    vlm, returns = models(name), 0
    strategy = Strategy(num_beams=BEAMS)
    ends: Any = strategy.config(vlm, longest).eos_token_id
    found = generate(vlm, batch(vlm, [0, 1]), opera, strategy=strategy, max_new_tokens=longest).tokens
    vlm.model.set_attn_implementation({"text_config": "eager"})
    for row, tokens in enumerate(found):
        slow = Slow(vlm, example(vlm, row))
        assert tokens.tolist() == slow.search(opera, ends, longest)
        returns += slow.returns
    use_capture(vlm.model)
    assert (returns > 0) == (opera is RESTLESS)


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
    opera = Opera(penalty=0.0, candidates=vlm.model.config.text_config.vocab_size)
    found = generate(vlm, inputs, opera, strategy=strategy, max_new_tokens=4).tokens
    plain = generate(vlm, inputs, "beam", strategy=strategy, max_new_tokens=4).tokens
    assert [tokens.tolist() for tokens in found] == [tokens.tolist() for tokens in plain]


def make_reader(vlm: Vlm, sample: int) -> tuple[_Reader, Tensor]:
    """A reader of three beams that have read three tokens of their own, and six next tokens for each."""
    inputs = batch(vlm)
    branch = Branch(vlm, inputs)
    with torch.no_grad(), _positions(vlm) as positions:
        branch.prefill()
        config = Strategy(num_beams=BEAMS).config(vlm, max_new_tokens=1)
        reader = _Reader(vlm, inputs, branch.cache, positions[0][..., sample, None, -1:], sample, config)
        tokens = torch.randint(20, 200, (BEAMS, 9), generator=torch.Generator().manual_seed(0))
        reader.read_again(tokens[:, :3])
    return reader, tokens[:, 3:]


@pytest.mark.parametrize("name", ["llava_clip_224+adapter", "qwen3_vl", "paligemma", "idefics3"])
def test_the_look_ahead_in_one_pass_is_that_of_one_pass_per_candidate(name: str, models: Models) -> None:
    reader, candidates = make_reader(models(name), sample=1)
    length = reader.cache.get_seq_length()
    with torch.no_grad():
        together = reader.look_ahead(candidates)
        assert reader.cache.get_seq_length() == length
        for place in range(candidates.shape[1]):
            _, alone = reader.read(candidates[:, place], torch.arange(BEAMS))
            reader.cache.crop(-1)
            torch.testing.assert_close(together[:, place], alone[:, 0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(together.sum(-1), torch.ones(together.shape[:2]))
    assert (together[:, :1] - together).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llava_clip_224+adapter", "qwen2_5_vl"])
def test_beams_go_on_from_their_parents(name: str, models: Models) -> None:
    vlm, parents = models(name), torch.tensor([2, 0, 0])
    (reader, tokens), (fresh, _) = make_reader(vlm, sample=0), make_reader(vlm, sample=0)
    with torch.no_grad():
        reader.read(tokens[:, 0], torch.arange(BEAMS))
        logits, rows = reader.read(tokens[:, 1], parents)
        history = torch.randint(20, 200, (BEAMS, 9), generator=torch.Generator().manual_seed(0))[:, :4]
        expected = fresh.read_again(torch.cat([history[parents], tokens[:, 1:2]], dim=1))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert rows.shape[-1] == fresh.cache.get_seq_length()


def test_the_state_of_a_beam_is_that_of_its_parent() -> None:
    start = _Beams.start(2, torch.device("cpu"))
    state = replace(
        start,
        tokens_BS=torch.tensor([[7], [8]]),
        score_B=torch.tensor([-1.0, -1.1]),
        products_BS=torch.tensor([[0.1], [0.2]]),
    )
    logits = torch.full((2, 10), -50.0)
    logits[1, [4, 5]] = torch.tensor([1.0, 0.5])
    logits[0, :] = 0.0
    after = state.choose(logits, GenerationConfig(eos_token_id=[9], max_new_tokens=5))
    assert after.tokens_BS.tolist() == [[8, 4], [8, 5]]
    assert after.parent_B.tolist() == [1, 1]
    assert after.choice_B.tolist() == [14, 15]
    assert after.products_BS.flatten().tolist() == pytest.approx([0.2, 0.2])
    assert not after.done


def test_going_back_takes_more_steps_than_the_threshold() -> None:
    retrospection = _Retrospection(Opera(threshold=6, initial_tokens=2))
    state = replace(_Beams.start(1, torch.device("cpu")), choice_B=torch.tensor([0]))
    found = [retrospection.check(state, torch.full((1, 2), 2)) is not None for _ in range(7)]
    assert found == [False] * 6 + [True]


def test_over_trust_is_the_largest_product_down_a_column() -> None:
    random = torch.Generator().manual_seed(0)
    opera, prompt, answer = Opera(initial_tokens=1, scale=30.0, penalty=2.0), 7, 5
    rows = torch.rand(2, answer + 3, prompt + answer + 1, generator=random).softmax(-1)
    products = torch.zeros(2, 0)
    for step in range(answer):
        products = opera._products(rows[:, step : step + 1, : prompt + step + 1], products)[:, 0]
    penalty, place = opera.over_trust(rows[:, answer:], products, torch.arange(3))
    for beam in range(2):
        for candidate in range(3):
            square = torch.stack([*rows[beam, :answer], rows[beam, answer + candidate]])[:, prompt:].double() * 30
            columns = torch.stack([square[j:, j].prod() for j in range(answer + 1)])
            assert int(place[beam, candidate]) == int(columns.argmax())
            assert float(penalty[beam, candidate]) == pytest.approx(2e-7 * float(columns.max()), rel=1e-4)
    narrow, latest = Opera(initial_tokens=1, scale=30.0, window=2).over_trust(
        rows[:, answer:], products, torch.arange(3)
    )
    assert latest.min() >= answer - 1
    assert (narrow <= penalty).all()
    drawn, _ = Opera().over_trust(rows[:, answer:], products, torch.arange(3))
    torch.testing.assert_close(drawn, -rows[:, answer:, :3].sum(-1))


def test_a_boundless_product_stays_a_penalty() -> None:
    penalty, _ = Opera(initial_tokens=1).over_trust(
        torch.full((1, 2, 60), 0.9), torch.full((1, 50), 300.0), torch.arange(3)
    )
    assert penalty.tolist() == [[LARGEST_PENALTY, LARGEST_PENALTY]]


def test_going_back_is_given_up_when_a_place_was_tried_often_enough() -> None:
    """As often as there are candidates to each of two steps: an answer always ends."""
    retrospection, places = _Retrospection(Opera(threshold=3, candidates=2, initial_tokens=2)), torch.full((1, 2), 2)
    state = _Beams.start(1, torch.device("cpu"))
    steps = []
    for turn in range(40):
        state = replace(state, choice_B=torch.tensor([turn]))
        found = retrospection.check(state, places)
        if found:
            steps.append((len(retrospection.states) - 1, found[1].tolist()))
    assert [step for step, _ in steps] == [3, 3, 2, 2]
    assert [len(forbidden) for _, forbidden in steps] == [1, 2, 1, 2]
    assert len(retrospection.states) > 20


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
