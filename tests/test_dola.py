"""DoLa against its formula, and against a decoder that reads everything again at each step."""

from typing import Any

import pytest
import torch
from torch import Tensor

from a3tune.adapters import Routing
from a3tune.decoding import generate
from a3tune.decoding.dola import Dola
from a3tune.decoding.strategy import Strategy
from a3tune.errors import ModelError
from a3tune.vlm.encode import TOKEN_MASKS, Example, pad
from a3tune.vlm.load import Vlm
from decoders import NEW, Models, batch, deep_vlm, example, grown

MODELS = ("llava_clip_224+adapter", "qwen2_5_vl", "gemma3", "idefics3+adapter")
TWO = Dola(layers=(0, 1))
"""Both layers of the zoo's models below the last."""
EDGE = Dola(layers=(1,))
"""For tied embeddings."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def deep() -> Vlm:
    return deep_vlm(layers=7, hidden=32)


def slow_scores(dola: Dola, vlm: Vlm, of: Example) -> Tensor:
    """Scores of the next token `[V]`: one pass without a cache, the formula over all that an answer may hold."""
    inputs: dict[str, Any] = dict(pad(vlm, [of], "right"))
    masks = {name: inputs.pop(name) for name in TOKEN_MASKS}
    inputs.pop("labels", None)
    routing = Routing(masks["prompt_mask"], masks["image_mask"])
    forward = {"routing": routing} if hasattr(vlm.model, "peft_config") else {}
    with torch.no_grad():
        out = vlm.model(**inputs, **forward, use_cache=False, output_hidden_states=True)
        head: Any = vlm.model.get_output_embeddings()
        early = [head(out.hidden_states[layer][:, -1])[0].float() for layer in dola.candidates(vlm)]
    mature = out.logits[0, -1].float()
    allowed = torch.arange(len(mature)) != vlm.model.config.image_token_id
    scores = torch.full_like(mature, -torch.inf)
    scores[allowed] = formula(mature[allowed], [layer[allowed] for layer in early])
    return scores


def formula(mature: Tensor, early: list[Tensor]) -> Tensor:
    """As published, for one sequence."""
    p = mature.softmax(-1)
    distances = []
    for logits in early:
        q = logits.softmax(-1)
        m = (p + q) / 2
        distances.append(float((m * (m / p).log()).mean() + (m * (m / q).log()).mean()) / 2)
    chosen = early[max(range(len(early)), key=distances.__getitem__)]
    scores = p.log() - chosen.log_softmax(-1)
    scores[p.log() < p.log().max() + torch.log(torch.tensor(0.1))] = -torch.inf
    return scores


def slow_greedy(dola: Dola, vlm: Vlm, of: Example) -> list[int]:
    ends = Strategy().config(vlm, NEW).eos_token_id
    answer: list[int] = []
    while len(answer) < NEW and not (answer and answer[-1] in ends):  # type: ignore[operator]
        answer.append(int(slow_scores(dola, vlm, of).argmax()))
        of = grown(of, answer[-1])
    return answer


def test_each_row_of_scores_is_the_formula() -> None:
    """And every row chooses its layer for itself."""
    random = torch.Generator().manual_seed(0)
    mature, early = 3 * torch.randn(6, 50, generator=random), 3 * torch.randn(6, 4, 50, generator=random)
    expected = torch.stack([formula(row, list(layers)) for row, layers in zip(mature, early, strict=True)])
    torch.testing.assert_close(Dola().combine(mature, early), expected.log_softmax(-1))
    chosen = Dola().divergence(mature.log_softmax(-1)[:, None], early.log_softmax(-1)).argmax(1)
    assert len(chosen.unique()) > 1


def test_the_divergence_of_the_paper_is_that_of_jensen_and_shannon() -> None:
    p, q = (torch.randn(50, generator=torch.Generator().manual_seed(seed)).softmax(0).double() for seed in (0, 1))
    m = (p + q) / 2
    published = ((m * (m / p).log()).mean() + (m * (m / q).log()).mean()) / 2
    paper = ((p * (p / m).log()).mean() + (q * (q / m).log()).mean()) / 2
    assert float(Dola().divergence(p.log(), q.log())) == pytest.approx(float(published))
    assert float(Dola(variant="paper").divergence(p.log(), q.log())) == pytest.approx(float(paper))


def test_greedy_answers_are_those_of_the_slow_decoder(deep: Vlm) -> None:
    together = generate(deep, batch(deep), "dola", max_new_tokens=NEW).tokens
    assert [tokens.tolist() for tokens in together] == [
        slow_greedy(Dola(), deep, example(deep, row)) for row in (0, 1, 2)
    ]
    plain = generate(deep, batch(deep), "greedy", max_new_tokens=NEW).tokens
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(together, plain, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_families_and_adapters_answer_as_the_slow_decoder(name: str, models: Models) -> None:
    vlm = models(name)
    dola = EDGE if name == "gemma3" else TWO
    together = generate(vlm, batch(vlm), dola, max_new_tokens=NEW).tokens
    for row, tokens in enumerate(together):
        assert tokens.tolist() == slow_greedy(dola, vlm, example(vlm, row))


def test_beams_keep_the_most_likely_answers_of_the_slow_scores(deep: Vlm) -> None:
    width, length = 3, 3
    found = generate(deep, batch(deep), "dola", strategy=Strategy(num_beams=width), max_new_tokens=length).tokens
    for row, tokens in enumerate(found):
        beams = [(0.0, example(deep, row))]
        for _ in range(length):
            grid = [(score, of, slow_scores(Dola(), deep, of).log_softmax(-1)) for score, of in beams]
            more = [
                (score + float(row_V[t]), grown(of, int(t))) for score, of, row_V in grid for t in row_V.topk(width)[1]
            ]
            beams = sorted(more, key=lambda beam: -beam[0])[:width]
        assert tokens.tolist() == beams[0][1].input_ids[-length:].tolist()


def test_sampling_stays_above_the_cutoff_and_repeats_with_its_seed(deep: Vlm) -> None:
    inputs = batch(deep)

    def sample(seed: int, **settings: Any) -> list[list[int]]:
        strategy = Strategy(do_sample=True, top_k=0, **settings)
        return [
            t.tolist() for t in generate(deep, inputs, "dola", strategy=strategy, seed=seed, max_new_tokens=4).tokens
        ]

    drawn = [sample(seed) for seed in range(8)]
    assert drawn[3] == sample(3)
    assert any(drawn[0] != other for other in drawn)
    for row in range(3):
        allowed = slow_scores(Dola(), deep, example(deep, row)).isfinite()
        assert all(allowed[answers[row][0]] for answers in drawn)
        assert int(allowed.sum()) > 1


def test_candidates_are_layers_that_the_model_has(deep: Vlm, models: Models) -> None:
    assert Dola().candidates(deep) == (0, 2, 4, 6)
    tied = models("gemma3")
    assert EDGE.candidates(tied) == (1,)
    with pytest.raises(ModelError, match="early layer from 1 to 1"):
        Dola().check(tied)
    with pytest.raises(ModelError, match="early layer from 0 to 6"):
        Dola(layers=(8,)).check(deep)


def test_nothing_stays_on_the_model(deep: Vlm) -> None:
    generate(deep, batch(deep), "dola", max_new_tokens=1)
    decoder: Any = deep.model.get_decoder()
    assert not any(layer._forward_pre_hooks for layer in decoder.layers)
