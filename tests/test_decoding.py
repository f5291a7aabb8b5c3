"""Decoding by name: settings, strategies, seeds, ends of answers, costs."""

import dataclasses
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from a3tune.decoding import DECODERS, STRATEGIES, Strategy, generate, make_decoder
from a3tune.decoding.plain import Greedy
from a3tune.decoding.strategy import end_tokens, make_strategy
from a3tune.errors import ConfigError
from a3tune.vlm.load import Vlm
from decoders import NEW, PROMPTS, Models, batch

PLAIN = ("sampling", "greedy", "beam", "nucleus")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def vlm(models: Models) -> Vlm:
    return models("llava_clip_224")


def test_every_method_has_its_name_and_a_strategy() -> None:
    contrastive = {"vcd", "avisc", "m3id", "damro", "pai"}
    assert DECODERS.keys() == {*PLAIN, *contrastive, "dola", "opera", "controlmllm"}
    for name, method in DECODERS.items():
        assert method.name == name
        assert method.strategy in STRATEGIES
        assert isinstance(make_decoder(name), method)


def test_published_settings() -> None:
    """Appendix B of the paper."""
    settings: dict[str, dict[str, Any]] = {
        "vcd": {"alpha": 1, "beta": 0.1, "noise_step": 500},
        "avisc": {"alpha": 1, "beta": 0.1, "selector": "topk", "tokens": 10},
        "m3id": {"decay": 0.02},
        "damro": {"alpha": 0.5, "beta": 0.1, "tokens": 10},
        "pai": {"boost": 0.2, "gamma": 1.1, "start_layer": 2, "end_layer": 32},
    }
    for name, expected in settings.items():
        own = dataclasses.asdict(make_decoder(name))  # type: ignore[call-overload]
        assert expected.items() <= own.items()
    assert STRATEGIES["beam"].num_beams == 5
    assert not STRATEGIES["beam"].do_sample
    assert STRATEGIES["nucleus"] == Strategy(do_sample=True, top_p=0.9, top_k=0, temperature=1.0)
    assert STRATEGIES["sampling"] == Strategy(do_sample=True, temperature=0.7, top_k=50, top_p=1.0)
    assert STRATEGIES["multinomial"] == Strategy(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    assert {DECODERS[name].strategy for name in ("vcd", "avisc", "m3id", "damro")} == {"multinomial"}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vdc", {}, "decode: expected one of sampling, greedy, .*vcd.*got 'vdc'"),
        ("vcd", {"alfa": 1.0}, "decode vcd: no setting 'alfa'; it has: alpha, beta, noise_step"),
        ("vcd", {"alpha": -1.0}, "decode vcd: alpha: .*greater than or equal to 0.*got -1.0"),
        ("vcd", {"noise_step": 1000}, "decode vcd: noise_step: .*less than 1000"),
        ("avisc", {"selector": "top10"}, "decode avisc: selector: .*'topk' or 'std'.*got 'top10'"),
        ("damro", {"variant": "paper"}, "decode damro: variant: .*'official' or 'medheval'"),
        ("greedy", {"alpha": 1.0}, "decode greedy: no setting 'alpha'; it has: none"),
    ],
)
def test_wrong_names_and_settings_are_named(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_decoder(name, settings)


def test_wrong_strategies_are_named(vlm: Vlm) -> None:
    with pytest.raises(ConfigError, match=r"strategy: expected one of greedy, beam, .*multinomial, got 'beams'"):
        generate(vlm, batch(vlm), strategy="beams")
    own = Strategy(num_beams=2)
    assert make_strategy(own) is own


def test_a_strategy_states_what_a_checkpoint_would_fill_in(vlm: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints bring their own sampling settings in a file that nobody reads."""
    expected = generate(vlm, batch(vlm), max_new_tokens=NEW).tokens
    checkpoint = GenerationConfig(
        do_sample=True,
        top_k=1,
        temperature=0.01,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        num_beams=2,
        use_cache=False,
        pad_token_id=vlm.tokenizer.pad_token_id,
    )
    monkeypatch.setattr(vlm.model, "generation_config", checkpoint)
    found = generate(vlm, batch(vlm), max_new_tokens=NEW).tokens
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_greedy_is_the_most_likely_token_of_transformers(vlm: Vlm) -> None:
    inputs = batch(vlm)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=vlm.tokenizer.pad_token_id)
    expected = vlm.model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]  # type: ignore
    found = generate(vlm, inputs, max_new_tokens=NEW).tokens
    for row, tokens in enumerate(found):
        assert torch.equal(tokens, expected[row, : len(tokens)])


@pytest.mark.parametrize("name", DECODERS)
def test_no_answer_holds_an_image(name: str, vlm: Vlm) -> None:
    """The model would look for the features of an image that is not there."""
    image = vlm.model.config.image_token_id
    head: Any = vlm.model.get_output_embeddings()
    likely = torch.zeros(head.out_features)
    likely[image] = 1e3
    hook = head.register_forward_hook(lambda module, args, output: output + likely)
    inputs = batch(vlm)
    image_tokens = int((inputs["input_ids"][0] == image).sum())
    try:
        generated = generate(vlm, inputs, name, max_new_tokens=NEW, regions_BN=torch.ones(len(PROMPTS), image_tokens))
    finally:
        hook.remove()
    assert all(len(tokens) and image not in tokens for tokens in generated.tokens)


@pytest.mark.parametrize("name", ["sampling", "nucleus", "vcd", "m3id", "avisc", "damro"])
def test_a_seed_repeats_an_answer_and_leaves_the_rest_of_chance_alone(name: str, vlm: Vlm) -> None:
    inputs = batch(vlm)
    hot = Strategy(do_sample=True, temperature=4.0, top_k=0)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = generate(vlm, inputs, name, strategy=hot, seed=1, max_new_tokens=NEW).tokens
    assert torch.equal(torch.rand(3), expected)
    again = generate(vlm, inputs, name, strategy=hot, seed=1, max_new_tokens=NEW).tokens
    other = generate(vlm, inputs, name, strategy=hot, seed=2, max_new_tokens=NEW).tokens
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_answers_end_with_their_end_token(vlm: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch(vlm)
    long = generate(vlm, inputs, max_new_tokens=NEW).tokens
    end = int(long[0][2])
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", [end, end])
    assert end_tokens(vlm) == sorted({end, vlm.tokenizer.eos_token_id})
    for name in ("greedy", "vcd"):
        for before, tokens in zip(long, generate(vlm, inputs, name, strategy="greedy").tokens, strict=True):
            assert tokens.dtype == torch.int64
            assert end not in tokens[:-1].tolist()
            if name == "greedy" and end in before.tolist():
                assert torch.equal(tokens, before[: before.tolist().index(end) + 1])


def test_a_padding_token_amid_an_answer_ends_nothing(vlm: Vlm) -> None:
    pad, end = vlm.tokenizer.pad_token_id, vlm.tokenizer.eos_token_id
    rows = torch.tensor([[5, pad, 6, end, pad], [5, pad, 6, pad, pad], [pad] * 5])

    class Rows(Greedy):
        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return rows

    found = [tokens.tolist() for tokens in generate(vlm, batch(vlm), Rows()).tokens]
    assert found == [[5, pad, 6, end], [5, pad, 6], []]


@pytest.mark.parametrize("name", ["greedy", "vcd"])
def test_answers_end_with_a_text_that_the_checkpoint_names(
    name: str, vlm: Vlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of the first LLaVA-Med do, which learned no end token."""
    inputs = batch(vlm, [0])
    long = generate(vlm, inputs, name, strategy="greedy", max_new_tokens=NEW).tokens[0]
    stop = vlm.tokenizer.decode(long[1:2])
    place = next(i for i, token in enumerate(long) if vlm.tokenizer.decode([int(token)]) == stop)
    monkeypatch.setattr(vlm.model.generation_config, "stop_strings", [stop])
    found = generate(vlm, inputs, name, strategy="greedy", max_new_tokens=NEW).tokens[0]
    assert torch.equal(found, long[: place + 1])
    assert vlm.model.generation_config.stop_strings == [stop]


@pytest.mark.parametrize(
    ("name", "passes"),
    [("greedy", NEW), ("beam", NEW), ("vcd", 2 * NEW), ("m3id", 2 * NEW), ("pai", 2 * NEW), ("avisc", 2 * NEW + 1)],
)
def test_the_cost_is_counted(name: str, passes: int, vlm: Vlm) -> None:
    cost = generate(vlm, batch(vlm), name, max_new_tokens=NEW)
    assert cost.passes == passes
    assert cost.seconds > 0
    assert cost.peak_bytes is None
    assert not vlm.model.get_decoder()._forward_pre_hooks


def test_beams_read_the_prompt_once(vlm: Vlm) -> None:
    """As `generate` of transformers answers, which reads it once per beam."""
    inputs = batch(vlm)
    rows: list[int] = []
    hook = vlm.model.get_decoder().register_forward_pre_hook(
        lambda module, args, forward: rows.append(len(forward["inputs_embeds"])), with_kwargs=True
    )
    found = generate(vlm, inputs, "beam", max_new_tokens=NEW).tokens
    hook.remove()
    assert rows == [len(found)] + [5 * len(found)] * (NEW - 1)
    config = STRATEGIES["beam"].config(vlm, NEW)
    expected = vlm.model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]  # type: ignore
    for row, tokens in enumerate(found):
        assert torch.equal(tokens, expected[row, : len(tokens)])


def test_an_own_decoder_can_be_given_in_place_of_a_name(vlm: Vlm) -> None:
    inputs = batch(vlm)
    by_name = generate(vlm, inputs, "vcd", settings={"alpha": 3.0}, max_new_tokens=NEW).tokens
    by_object = generate(vlm, inputs, make_decoder("vcd", {"alpha": 3.0}), max_new_tokens=NEW).tokens
    assert all(torch.equal(one, other) for one, other in zip(by_name, by_object, strict=True))
