import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from a3tune.adapters import add_adapter
from a3tune.attention.capture import use_capture
from a3tune.config import AdapterConfig, EvaluationConfig
from a3tune.data.images import load_image
from a3tune.errors import ConfigError, DataError, LabelError, ModelError, RunError
from a3tune.evaluation.evaluate import evaluate
from a3tune.evaluation.predictions import read_maps, read_predictions
from a3tune.evaluation.results import clusters, make_prediction, summarise
from a3tune.machine.digests import unsealed
from a3tune.masks import encode_mask
from a3tune.run.folder import RunFolder
from a3tune.types import Region, Sample
from a3tune.vlm.encode import TOKEN_MASKS, encode
from a3tune.vlm.grids import token_boxes
from a3tune.vlm.load import Vlm
from a3tune.vlm.patches import members, token_weights
from a3tune.vlm.tiny import random_vlm, tiny_processor, train_tokenizer
from evaluations import stop_after

PROMPTS = ("Is the liver normal?", "Which organ is shown in the upper left part of this image?", "What is it?")
SHORT = EvaluationConfig(batch_size=2, max_new_tokens=4, rows="answer")


def picture(seed: int, width: int = 24, height: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_vlm(seed: int = 0) -> Vlm:
    torch.manual_seed(seed)
    model = random_vlm(seed, hidden=32, layers=2, heads=4, kv_heads=2, vocab=300, image_size=48)
    # Sharper attention than an untrained model's, so that maps and answers differ between samples.
    for name, weight in model.named_parameters():
        if "language_model" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.data *= 8
    use_capture(model)
    return Vlm(model, tiny_processor(train_tokenizer(PROMPTS, vocab=300), image_size=48), f"random-{seed}")


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return make_vlm()


@pytest.fixture
def samples() -> list[Sample]:
    regions = ((Region(box=(0, 0, 12, 12)),), None, (), (Region(box=(6, 6, 20, 24)), Region(box=(0, 0, 6, 6))), None)
    return [
        Sample(
            id=f"s/{i}",
            image=picture(i // 2),
            prompt=PROMPTS[i % 3],
            answer="no" if i % 2 else "left lung",
            answer_type="closed" if i % 2 else "open",
            regions=region,
            meta={"question_type": "presence" if i % 2 else "organ"},
        )
        for i, region in enumerate(regions)
    ]


def test_order_and_independence_of_the_batch(vlm, samples):
    together, alone = evaluate(vlm, samples, SHORT), evaluate(vlm, samples, replace(SHORT, batch_size=1))
    assert [p.id for p in together.predictions] == [s.id for s in samples]
    assert len({p.prediction for p in alone.predictions}) > 1
    for one, other in zip(together.predictions, alone.predictions, strict=True):
        assert replace(one, attention={}) == replace(other, attention={})
        assert dict(one.attention) == pytest.approx(dict(other.attention), abs=1e-4)
    assert [bool(p.attention) for p in together.predictions] == [True, False, False, True, False]


def reference_maps(vlm: Vlm, sample: Sample, tokens: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One sample at a time, one token at a time, on the eager model's whole attention."""
    batch = encode(vlm, [load_image(sample.image)], [sample.prompt])
    masks = {name: batch.pop(name)[0] for name in TOKEN_MASKS}
    ids, prompt = batch["input_ids"], batch["input_ids"].shape[1]
    vlm.model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        for _ in range(tokens):
            logits = vlm.model(input_ids=ids, pixel_values=batch["pixel_values"]).logits[0, -1]
            ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
            if ids[0, -1] == vlm.tokenizer.eos_token_id:
                break
        attentions = vlm.model(input_ids=ids, pixel_values=batch["pixel_values"], output_attentions=True).attentions
    use_capture(vlm.model)
    maps, ratios = [], []
    for layer in attentions:
        for head in layer[0]:
            row = head[prompt - 1 : ids.shape[1] - 1].mean(0)[:prompt]
            maps.append(row[masks["image_mask"]])
            ratios.append(row[masks["image_mask"]].sum() / row[masks["image_mask"] | masks["prompt_mask"]].sum())
    top = torch.stack(ratios).topk(heads).indices
    return torch.stack([maps[index] for index in top]).mean(0), torch.stack(maps).mean(0)


def test_maps_and_metrics_equal_those_of_the_eager_model(vlm, samples):
    found = evaluate(vlm, samples, replace(SHORT, heads=3))
    for sample, prediction in zip(samples, found.predictions, strict=True):
        selected, everywhere = reference_maps(vlm, sample, tokens=4, heads=3)
        np.testing.assert_allclose(found.maps[sample.id], selected / selected.max(), atol=2e-3)
        if not sample.regions:
            continue
        mask = np.zeros((24, 24), bool)
        for region in sample.regions:
            x0, y0, x1, y1 = map(int, region.box or ())
            mask[y0:y1, x0:x1] = True
        inside = torch.from_numpy(members(token_weights(mask, token_boxes(vlm, 24, 24)))).bool()
        for values, suffix in ((selected, ""), (everywhere, "_all_heads")):
            expected = {
                "attention_mass": (values[inside].sum() / values.sum()).item(),
                "intensity": (values[inside].mean() / values.max()).item(),
                "coverage": (values[inside] >= 0.15 * values.max()).float().mean().item(),
                "pointing": float(inside[values.argmax()]),
            }
            own = {name: prediction.attention[name + suffix] for name in expected}
            assert own == pytest.approx(expected, abs=1e-4)


def test_sampling_settings_of_the_checkpoint_do_not_count(vlm, samples):
    expected = evaluate(vlm, samples, SHORT).predictions
    config = vlm.model.generation_config
    earlier = config.to_dict()
    config.update(do_sample=True, temperature=3.0, repetition_penalty=9.0, num_beams=2)
    try:
        assert [p.prediction for p in evaluate(vlm, samples, SHORT).predictions] == [p.prediction for p in expected]
    finally:
        config.update(**earlier)


def test_summary(vlm, samples, tmp_path):
    found = evaluate(vlm, samples, replace(SHORT, tau=0.5, normalisation="sum"), out_folder=tmp_path / "run")
    assert found.counts == {"samples": 5, "groups": 3, "open": 3, "closed": 2, "with_attention": 2}
    assert found.metrics["open_recall"].count == 3 and found.metrics["intensity"].count == 2
    types = found.breakdown["question_type"]
    assert set(types) == {"organ", "presence"}
    assert set(types["organ"]) >= {"open_recall", "intensity"}
    assert "open_recall" not in types["presence"]
    written = json.loads((tmp_path / "run" / "results.json").read_text(), parse_constant=pytest.fail)
    assert unsealed(written) == json.loads(json.dumps(found.as_json()))
    low, high = written["metrics"]["open_recall"]["ci95"]
    assert low <= written["metrics"]["open_recall"]["mean"] <= high
    # One image alone has no interval: null, not NaN.
    assert written["breakdown"]["question_type"]["organ"]["intensity"]["ci95"] == [None, None]
    assert written["settings"]["normalisation"] == "sum"


def test_a_baseline_is_summarised_the_same_way(samples):
    found = summarise(samples, [make_prediction(sample, "left") for sample in samples])
    assert found.metrics["open_recall"].mean == 0.5
    assert found.metrics["closed_accuracy"].mean == 0.0
    assert found.counts["with_attention"] == 0


def test_groups_are_patients_or_else_images(samples):
    assert len(set(clusters(samples))) == 3
    one = [replace(sample, meta={"patient": "p"}) for sample in samples]
    assert clusters(one) == ["p"] * 5


def test_a_file_is_one_group_however_it_is_named_and_whatever_slice_of_it_is_shown(samples, tmp_path: Path):
    (tmp_path / "more").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "scan.png")
    paths = ["scan.png", "more/../scan.png", "link.png", "scan.png#frame=1", "scan.png#frame=2"]
    named = [replace(samples[0], image=tmp_path / path, meta={}) for path in paths]
    assert len({*clusters(named)}) == 1
    assert len({*clusters([*named, replace(samples[0], image=tmp_path / "other.png", meta={"patient": ""})])}) == 2


def test_choices_are_scored_with_their_options(samples):
    choice = replace(samples[0], answer="left", answer_type="choice", options=("left", "right"))
    found = summarise([choice] * 2, [make_prediction(choice, text) for text in ("on the lefthand side", "right")])
    assert found.metrics["choice_accuracy"].mean == 0.5
    assert found.metrics["choice_accuracy_strict"].mean == 0.0


def test_the_order_of_the_rows_changes_no_answer(vlm, samples):
    same = [replace(samples[0], id=str(i)) for i in range(6)]
    settings = replace(SHORT, decode="sampling")
    first, reverse = evaluate(vlm, same, settings), evaluate(vlm, same[::-1], settings)
    assert first.predictions == reverse.predictions[::-1]
    assert len({p.prediction for p in first.predictions}) > 1


def test_chance_differs_between_batches_and_repeats(vlm, samples):
    same = [replace(samples[0], id=str(i), regions=None) for i in range(4)]
    first, second = (
        [p.prediction for p in evaluate(vlm, same, replace(SHORT, batch_size=1, decode="sampling", seed=3)).predictions]
        for _ in range(2)
    )
    assert first == second
    assert len(set(first)) > 1


def test_stopped_evaluation_goes_on_where_it_was(vlm, samples, tmp_path, monkeypatch):
    whole = evaluate(vlm, samples, SHORT, out_folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        evaluate(vlm, samples, SHORT, out_folder=tmp_path / "run", progress=stop_after(2))
    folder = RunFolder.open(tmp_path / "run")
    assert len(read_predictions(folder)) == 4
    # Killed while writing: the last line is cut in the middle.
    folder.predictions.write_bytes(folder.predictions.read_bytes()[:-20])
    assert len(read_predictions(folder)) == 3

    asked: list[int] = []
    generate = vlm.model.generate
    monkeypatch.setattr(vlm.model, "generate", lambda **kw: asked.append(len(kw["input_ids"])) or generate(**kw))
    seen: list[tuple[int, int]] = []
    again = evaluate(vlm, samples, SHORT, out_folder=folder.path, progress=lambda *at: seen.append(at))
    assert asked == [2, 1]
    assert seen[-1] == (5, 5)
    assert again.predictions == whole.predictions
    assert again.metrics == whole.metrics
    assert {name: values.tolist() for name, values in read_maps(folder).items()} == {
        name: values.tolist() for name, values in whole.maps.items()
    }
    assert sorted(p.id for p in read_predictions(folder)) == sorted(s.id for s in samples)
    assert folder.predictions.read_bytes().count(b"\n") == 5

    asked.clear()
    done = evaluate(vlm, samples, SHORT, out_folder=folder.path)
    assert asked == [] and done.predictions == whole.predictions
    assert done.cost.seconds == pytest.approx(again.cost.seconds)


def test_nothing_to_measure_attention_on_is_told(vlm, samples):
    empty = Region(mask=encode_mask(np.zeros((24, 24), dtype=bool)))
    results = evaluate(vlm, [replace(samples[0], regions=(empty,)), samples[1]], SHORT)
    assert "no question has a region" in results.absent["attention"] and results.counts["with_attention"] == 0
    assert "attention" not in evaluate(vlm, samples[:1], SHORT).absent


def test_reports_are_scored_with_what_is_there(vlm, samples, tmp_path):
    reports = [replace(sample, answer_type="report", answer="no acute finding in the chest") for sample in samples]
    results = evaluate(vlm, reports, SHORT, out_folder=tmp_path / "run")
    assert results.metrics["rouge_l"].count == len(reports)
    assert "bertscore" in results.absent and "bertscore" not in results.metrics
    stored = read_predictions(RunFolder.open(tmp_path / "run"))
    assert all(set(prediction.report) >= {"rouge_l"} for prediction in stored)
    assert summarise(reports, results.predictions).metrics == results.metrics
    with pytest.raises(ConfigError, match="weights: expected nltk_data"):
        evaluate(vlm, reports, replace(SHORT, weights={"nonesuch": tmp_path}))


def test_too_large_batches_are_halved(vlm, samples, monkeypatch):
    whole = evaluate(vlm, samples, SHORT)
    generate = vlm.model.generate
    tried: list[int] = []

    def little_memory(at_once: int):
        def answer(**inputs: Any) -> torch.Tensor:
            tried.append(len(inputs["input_ids"]))
            if len(inputs["input_ids"]) > at_once:
                raise torch.OutOfMemoryError
            return generate(**inputs)

        return answer

    monkeypatch.setattr(vlm.model, "generate", little_memory(1))
    found = evaluate(vlm, samples, replace(SHORT, batch_size=4))
    assert tried == [4, 2, 1, 1, 2, 1, 1, 1]
    assert [p.prediction for p in found.predictions] == [p.prediction for p in whole.predictions]
    monkeypatch.setattr(vlm.model, "generate", little_memory(0))
    with pytest.raises(ModelError, match=r"sample .*: the device has too little memory for it alone"):
        evaluate(vlm, samples, SHORT)


def other_prompt(samples: Sequence[Sample]) -> list[Sample]:
    return [replace(samples[0], prompt="Something else?"), *samples[1:]]


def test_an_evaluation_of_something_else_is_refused(vlm, samples, tmp_path):
    path = tmp_path / "run"
    evaluate(vlm, samples, SHORT, out_folder=path)
    before = (path / "predictions.jsonl").read_bytes()
    with pytest.raises(RunError, match="the prompt of sample 's/0' is another"):
        evaluate(vlm, other_prompt(samples), SHORT, out_folder=path)
    with pytest.raises(RunError, match=r"'s/.' is not among those"):
        evaluate(vlm, samples[:2], SHORT, out_folder=path)
    with pytest.raises(RunError, match=r"with tau=0.15, not 0.3"):
        evaluate(vlm, samples, replace(SHORT, tau=0.3), out_folder=path)
    with pytest.raises(RunError, match="the weights of the model are others"):
        evaluate(replace(make_vlm(1), name=vlm.name), samples, SHORT, out_folder=path)
    assert (path / "predictions.jsonl").read_bytes() == before
    # More samples than before are welcome.
    more = [*samples, replace(samples[0], id="new")]
    assert evaluate(vlm, more, SHORT, out_folder=path).predictions[-1].id == "new"


def test_damaged_folder_is_refused(vlm, samples, tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(RunError, match="not ours"):
        evaluate(vlm, samples, SHORT, out_folder=tmp_path)
    folder = RunFolder.create(tmp_path / "run")
    with pytest.raises(RunError, match="evaluate first"):
        read_predictions(folder)
    evaluate(vlm, samples, SHORT, out_folder=folder.path)
    lines = folder.predictions.read_text().splitlines()
    folder.predictions.write_text("\n".join([lines[0][:-9], *lines[1:]]) + "\n")
    with pytest.raises(RunError, match=r"predictions.jsonl:1: .* damaged"):
        evaluate(vlm, samples, SHORT, out_folder=folder.path)
    folder.predictions.write_text("\n".join([*lines, lines[1]]) + "\n")
    with pytest.raises(RunError, match=r"predictions.jsonl:6: .* line 2 again; remove one"):
        evaluate(vlm, samples, SHORT, out_folder=folder.path)
    (folder.path / "identity.json").unlink()
    with pytest.raises(RunError, match=r"identity.json, .* missing"):
        evaluate(vlm, samples, SHORT, out_folder=folder.path)
    next((folder.path / "maps").iterdir()).write_bytes(b"x" * 30)
    with pytest.raises(RunError, match="remove it"):
        read_maps(folder)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": Path("none.png")}, DataError, "sample s/0: none.png: expected an image"),
        ({"prompt": "what </s> is it"}, DataError, "sample s/0: .*control token"),
        ({"regions": (Region(box=(90.0, 0.0, 99.0, 9.0)),)}, LabelError, "sample s/0: .*outside"),
        ({"regions": (Region(mask=encode_mask(np.ones((9, 9)))),)}, LabelError, "sample s/0: .*9 x 9"),
        ({"id": "s/1"}, DataError, "different id"),
    ],
)
def test_a_sample_that_cannot_be_used_is_named(vlm, samples, change, error, message):
    with pytest.raises(error, match=message):
        evaluate(vlm, [replace(samples[0], **change), samples[1]], SHORT)


def test_heads_and_rows_out_of_range(vlm, samples):
    with pytest.raises(ConfigError, match="at most 8"):
        evaluate(vlm, samples, replace(SHORT, heads=9))
    with pytest.raises(ConfigError, match="rows"):
        evaluate(vlm, samples, replace(SHORT, rows="all"))  # pyright: ignore[reportArgumentType]


def test_region_out_of_the_models_view_has_no_metrics(vlm, samples):
    # A wide image is cropped to its centre: its left edge is never seen.
    unseen = replace(samples[0], image=picture(9, width=72, height=24), regions=(Region(box=(0, 0, 6, 6)),))
    found = evaluate(vlm, [unseen], SHORT)
    assert found.predictions[0].attention == {}
    assert found.counts["with_attention"] == 0 and "intensity" not in found.metrics


def test_a_method_that_needs_regions_goes_on_past_one_that_the_model_does_not_see(vlm, samples):
    unseen = replace(samples[0], image=picture(9, width=72, height=24), regions=(Region(box=(0, 0, 6, 6)),))
    seen = replace(samples[1], regions=(Region(box=(4, 4, 20, 20)),))
    greedy, told = (evaluate(vlm, [unseen, seen], replace(SHORT, decode=name)) for name in ("greedy", "controlmllm"))
    assert told.predictions[0].prediction == greedy.predictions[0].prediction  # nothing to look at, nothing changed


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"decode": "controlmllm"}, ModelError, "true regions of every question"),
        ({"decode": "opera", "strategy": "sampling"}, ConfigError, "cannot sample"),
    ],
)
def test_what_a_method_cannot_do_is_told_before_anything_is_asked(vlm, samples, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        evaluate(vlm, [replace(samples[0], regions=())], replace(SHORT, **settings), out_folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["lora", "a3moe"])
def test_with_an_adapter(samples, kind):
    plain = make_vlm()
    before = evaluate(plain, samples, SHORT)
    torch.manual_seed(0)
    model = add_adapter(plain.model, AdapterConfig(kind, rank=4, expert_rank=4))
    for vlm in (plain, replace(plain, model=model)):
        assert [p.prediction for p in evaluate(vlm, samples, SHORT).predictions] == [
            p.prediction for p in before.predictions
        ]
    for name, weight in model.named_parameters():
        if "lora_B" in name or "experts.B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    model.train()
    after, alone = evaluate(plain, samples, SHORT), evaluate(plain, samples, replace(SHORT, batch_size=1))
    assert model.training
    assert after.predictions[0].attention != before.predictions[0].attention
    for one, other in zip(after.predictions, alone.predictions, strict=True):
        assert one.prediction == other.prediction
        assert dict(one.attention) == pytest.approx(dict(other.attention), abs=1e-3)
