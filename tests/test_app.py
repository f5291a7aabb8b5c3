import copy
import gc
import io
import json
import socket
import sys
import threading
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from a3tune.app import host, server, view
from a3tune.app import model as app_model
from a3tune.app.examples import KINDS, examples
from a3tune.app.hidden import Hidden, ask_hidden
from a3tune.app.model import BASE, WHOLE, Answer, Asker
from a3tune.app.regions import ChosenRegion, Segmenter, box_region
from a3tune.app.session import LARGEST, Session
from a3tune.app.visitors import Visitors
from a3tune.cli import app
from a3tune.cli import explorer as command
from a3tune.commands.subject import load_models
from a3tune.config import EvaluationConfig, LabelsConfig, ModelConfig, load_config
from a3tune.demo.plan import read_recipe
from a3tune.errors import ConfigError, DataError, LabelError, ModelError
from a3tune.evaluation.evaluate import evaluate
from a3tune.evaluation.occlusion import hidden_parts, occlude
from a3tune.metrics.vqa import normalise
from a3tune.types import Sample
from a3tune.vlm.encode import prepare
from a3tune.vlm.grids import token_boxes
from a3tune.vlm.look import token_texts
from random_adapter import save_random_adapter

QUESTION = "Does the spleen contain a lesion?"
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\"'>${7*7}{{7*7}}"
SHORT = EvaluationConfig(max_new_tokens=12)


@pytest.fixture(scope="module")
def asker(tmp_path_factory: pytest.TempPathFactory) -> Asker:
    """The shipped model, and an adapter of it that changes what it says."""
    folder = tmp_path_factory.mktemp("adapters") / "mine"
    base = load_models(ModelConfig(device="cpu"), {BASE: None})[BASE]
    save_random_adapter(base, folder)
    return Asker(load_models(ModelConfig(device="cpu"), {BASE: None, "mine": folder}), SHORT)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return examples()[0].image


@pytest.fixture(scope="module")
def answer(asker: Asker, image: Image.Image) -> Answer:
    return ask(asker, image)


def ask(asker: Asker, image: Image.Image, question: str = QUESTION, name: str = BASE, method: str = "greedy") -> Answer:
    *_, found = asker.ask(name, method, image, question)
    assert isinstance(found, Answer)
    return found


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def session_of(image: Image.Image, answer: Answer) -> Session:
    return Session(image, answers={0: answer})


def test_the_maps_of_the_tokens_average_to_that_of_the_answer(answer: Answer):
    layers, heads, rows, tokens = answer.maps_LHGN.shape
    assert (layers, heads, rows) == (4, 8, len(answer.tokens) + 1) and answer.maps_LHGN.dtype == np.float16
    each = np.stack([answer.attention(row=row) for row in range(1, rows)])
    assert each.shape == (rows - 1, tokens)
    assert each.std(0).max() > 1e-3  # tokens do look at different places
    np.testing.assert_allclose(each.mean(0), answer.attention(row=WHOLE), rtol=2e-3, atol=1e-5)


def test_the_map_of_each_head_and_token_is_that_of_the_eager_model(asker: Asker, image: Image.Image, answer: Answer):
    vlm = asker.models[BASE]
    example = prepare(vlm, [image], QUESTION)
    pixels, asked = example.images["pixel_values"], example.input_ids[None]
    eager = copy.deepcopy(vlm.model)
    eager.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        out = eager.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            pixel_values=pixels,
            max_new_tokens=SHORT.max_new_tokens,
            do_sample=False,
        )
        attentions = eager(input_ids=out, pixel_values=pixels, output_attentions=True).attentions
    image_N = (out[0] == vlm.model.config.image_token_id).nonzero().flatten()
    first = example.prompt_length - 1
    for row in range(1, len(answer.tokens) + 1):
        for layer, head in ((0, 0), (3, 7), (2, 5)):
            expected = attentions[layer][0, head, first + row - 1, image_N].numpy()
            np.testing.assert_allclose(answer.attention((layer, head), row), expected, rtol=2e-3, atol=1e-6)


def test_an_answer_is_that_of_evaluate(asker: Asker, image: Image.Image, answer: Answer):
    sample = Sample("q", png(image), QUESTION, "", "report")
    found = evaluate(asker.models[BASE], [sample], replace(SHORT, rows="answer"))
    assert answer.text == found.predictions[0].prediction != ""
    map_N = answer.attention()
    np.testing.assert_allclose(map_N / map_N.max(), found.maps["q"].astype(np.float32), atol=2e-3)


def test_an_answer_is_told_while_it_grows(asker: Asker, image: Image.Image):
    *partial, last = asker.ask(BASE, "greedy", image, QUESTION)
    assert len(partial) >= 3 and isinstance(last, Answer)
    assert all(isinstance(text, str) and last.text.startswith(text.strip()) for text in partial)
    assert partial == sorted(partial, key=len)
    *nothing, last = asker.ask(BASE, "beam", image, QUESTION)
    assert nothing == [] and isinstance(last, Answer)


def test_models_share_the_weights_of_the_base_and_differ_in_what_they_say(asker: Asker, image: Image.Image):
    base, mine = asker.models[BASE].model, asker.models["mine"].model
    shared = {weight.data_ptr() for weight in base.parameters()}
    assert shared <= {weight.data_ptr() for weight in mine.parameters()}
    fresh = Asker(load_models(ModelConfig(device="cpu"), {BASE: None}), SHORT)
    assert ask(asker, image).text == ask(fresh, image).text != ask(asker, image, name="mine").text


def test_visitors_who_ask_at_once_get_their_own_answers(asker: Asker):
    questions = [
        (example.image, example.questions[0].prompt, name) for example in examples()[:2] for name in asker.models
    ]
    alone = [ask(asker, image, prompt, name) for image, prompt, name in questions]
    found: dict[int, Answer] = {}

    def visit(number: int) -> None:
        image, prompt, name = questions[number]
        found[number] = ask(asker, image, prompt, name)

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(len(questions))]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    for number, expected in enumerate(alone):
        assert (found[number].text, found[number].question) == (expected.text, expected.question)
        np.testing.assert_array_equal(found[number].maps_LHGN, expected.maps_LHGN)


def test_long_answers_keep_the_maps_that_fit(asker: Asker, image: Image.Image, answer: Answer, monkeypatch):
    layers, heads, _, tokens = answer.maps_LHGN.shape
    monkeypatch.setattr(app_model, "MAX_MAP_BYTES", 2 * layers * heads * tokens * 4)
    found = ask(asker, image)
    assert found.text == answer.text and found.tokens == answer.tokens[:3]
    np.testing.assert_array_equal(found.maps_LHGN, answer.maps_LHGN[:, :, :4])


def test_mistakes_reach_whoever_asks_and_the_next_question_is_answered(asker: Asker, image: Image.Image):
    with pytest.raises(DataError, match="true regions"):
        ask(asker, image, method="controlmllm")
    with pytest.raises(ConfigError, match="expected one of"):
        ask(asker, image, method="nonsense")
    assert ask(asker, image).text


def test_a_method_that_needs_a_region_gets_it(asker: Asker, image: Image.Image):
    *_, found = asker.ask(BASE, "controlmllm", image, QUESTION, box_region((10, 10, 60, 60), image))
    assert isinstance(found, Answer) and found.text


def test_texts_of_tokens_join_to_the_answer(asker: Asker):
    tokenizer = asker.models[BASE].tokenizer
    ids = tokenizer("liver: 5 \u00b5m \U0001fac1 lesion", add_special_tokens=False)["input_ids"]
    ids.append(tokenizer.eos_token_id)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and texts[-1] == "" and not any("\ufffd" in text for text in texts)
    assert "".join(texts) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("corners", "error"),
    [
        ((1, 2, None, 4), DataError),
        ((30, 2, 30, 40), DataError),
        ((2, 40, 30, 4), DataError),
        ((500, 500, 600, 600), LabelError),
    ],
)
def test_a_box_without_pixels_is_refused(image: Image.Image, corners, error):
    with pytest.raises(error, match="box"):
        box_region(corners, image)


def test_the_question_picks_segments_of_the_image(image: Image.Image):
    picks = Segmenter(LabelsConfig(top_k=3)).pick(image, QUESTION)
    assert len(picks.best) == 3 < len(picks.ranked.segments)
    similarity = picks.ranked.similarity
    assert list(similarity[list(picks.best)]) == sorted(similarity, reverse=True)[:3]
    assert picks.mask(0).shape == (image.height, image.width) and 0 < picks.mask(0).mean() < 1


def test_scores_are_measured_against_the_region(image: Image.Image, answer: Answer):
    session = session_of(image, answer)
    assert view.attention_scores(session, answer, "selected", WHOLE, SHORT) == {}
    session.set_region(ChosenRegion(np.ones((image.height, image.width), bool), "everything"))
    assert view.attention_scores(session, answer, "selected", WHOLE, SHORT)["attention_mass"] == pytest.approx(1)
    box = token_boxes_of_the_peak(answer)
    session.set_region(box_region(box, image))
    found = view.attention_scores(session, answer, "selected", WHOLE, SHORT)
    assert found["coverage"] == found["intensity"] == 1.0 and 0 < (found["attention_mass"] or 0) < 1
    shown = Tags(view.looked(session, 0, "selected", WHOLE, SHORT)).text
    assert "Coverage100.0 %" in shown and "Intensity1.000" in shown and "Intensity1.000 %" not in shown


def test_an_answer_is_not_scored_against_the_region_of_another_question(image: Image.Image, answer: Answer):
    session = session_of(image, answer)
    mask = box_region((10, 20, 50, 60), image).mask
    session.set_region(ChosenRegion(mask, "spleen", "Is there a lesion in the spleen?"))
    assert view.attention_scores(session, answer, "selected", WHOLE, SHORT) == {}
    shown = Tags(view.looked(session, 0, "selected", WHOLE, SHORT))
    assert "Not scored: the region (spleen) is that of “Is there a lesion in the spleen?”" in shown.text
    assert "Coverage" not in shown.text and not any(own.get("class") == "region" for _, own in shown.found)
    found = json.loads(view.as_json(session, "selected", [WHOLE], SHORT))
    assert found["region"]["question"] == "Is there a lesion in the spleen?"
    assert set(found["answers"][0]["chosen"]) == {"word"}
    session.set_region(ChosenRegion(mask, "liver", QUESTION))
    shown = Tags(view.looked(session, 0, "selected", WHOLE, SHORT))
    assert "Against the region: liver, left 10, top 20, right 50, bottom 60. Coverage counts" in shown.text
    assert any(own.get("class") == "region" for _, own in shown.found)


def test_nothing_is_hidden_or_told_for_another_question(asker: Asker, image: Image.Image, answer: Answer):
    session = session_of(image, answer)
    session.set_region(replace(box_region((10, 20, 50, 60), image), question="Another?"))
    assert list(ask_hidden(asker, session, answer, "mean")) == [] and session.region_of(QUESTION) is None
    session.set_region(replace(box_region((10, 20, 50, 60), image), question=QUESTION))
    assert session.region_of(QUESTION) is session.region


def test_an_answer_names_its_question_its_settings_and_what_it_was_told(asker: Asker, image: Image.Image):
    *_, told = asker.ask(BASE, "controlmllm", image, QUESTION, box_region((10, 10, 60, 60), image))
    assert isinstance(told, Answer)
    assert Tags(view.answered(told, SHORT)).text.startswith(
        f"“{QUESTION}”{BASE} · controlmllm · at most 12 tokens · seed 0 · told to look at: box"
    )
    *_, free = asker.ask(BASE, "greedy", image, QUESTION, box_region((10, 10, 60, 60), image))
    assert "told" not in Tags(view.answered(free, SHORT)).text


def test_a_tab_that_comes_back_finds_its_own_and_no_other(image: Image.Image, answer: Answer):
    visitors, begin = Visitors(), Session(image)
    first = visitors.arrive(None, begin)
    first.answers[0] = answer
    again = visitors.arrive(first.key, begin)
    assert again.answers == {0: answer} and again.key != first.key
    again.answers.clear()  # what one tab does is not seen in one that was doubled
    assert first.answers and begin.answers == {}
    assert visitors.arrive("guessed", begin).answers == {}
    key = first.key
    del first, again
    gc.collect()
    assert visitors.arrive(key, begin).answers == {}  # nobody keeps it


def token_boxes_of_the_peak(answer: Answer) -> tuple[float, ...]:
    return tuple(answer.boxes[answer.attention().argmax()].tolist())


def test_large_images_are_shown_small_and_measured_in_full(asker: Asker, image: Image.Image):
    large = image.resize((1500, 900))
    found = ask(asker, large)
    session = session_of(large, found)
    half = box_region((0, 0, 750, 900), large)
    session.set_region(half)
    assert session.shown().shape == (384, LARGEST, 3) and session.shown_mask(half.mask).mean() == 0.5
    np.testing.assert_array_equal(found.boxes, token_boxes(asker.models[BASE], 900, 1500))
    assert Image.open(io.BytesIO(view.png(session, 0, "all", WHOLE))).size == (LARGEST, 384)
    assert json.loads(view.as_json(session, "all", [WHOLE], SHORT))["region"]["box"] == [0, 0, 750, 900]


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(str(html))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_whatever_people_and_models_write_is_text(image: Image.Image, answer: Answer):
    hostile = Answer(
        HOSTILE,
        HOSTILE,
        HOSTILE,
        HOSTILE,
        (HOSTILE,) * len(answer.tokens),
        answer.maps_LHGN,
        answer.ratio_LH,
        answer.selected_LH,
        answer.boxes,
    )
    everything = np.ones((image.height, image.width), bool)
    session = Session(image, HOSTILE, {0: hostile}, region=ChosenRegion(everything, HOSTILE, HOSTILE))
    elsewhere = Session(image, HOSTILE, {0: hostile}, region=ChosenRegion(everything, HOSTILE, f"{HOSTILE}?"))
    session.picks = Segmenter(LabelsConfig()).pick(image, "liver")
    session.picks = replace(session.picks, question=HOSTILE)
    session.hidden[0] = [Hidden("inside", "mean", HOSTILE, True, session.shown())]
    parts = [
        view.answering(HOSTILE, HOSTILE, HOSTILE, HOSTILE, SHORT),
        view.answered(replace(hostile, told=HOSTILE), SHORT),
        view.failed(HOSTILE, HOSTILE, HOSTILE, HOSTILE, SHORT),
        view.words(hostile, 0),
        view.looked(session, 0, "selected", 1, SHORT),
        view.looked(elsewhere, 0, "selected", 1, SHORT),
        view.scan(session),
        view.hidden(session, 0),
        view.region_line(session),
        view.picks_list(session),
        view.notice(HOSTILE, "error"),
    ]
    for part in parts:
        tags = Tags(part)
        names = {tag for tag, _ in tags.found}
        assert not names & {"img", "script"} and not any(
            key.startswith("on") for _, attributes in tags.found for key in attributes
        )
        shown = tags.text + "".join(str(value) for _, attributes in tags.found for value in attributes.values())
        assert HOSTILE in shown


def test_the_picture_says_in_words_what_it_shows(image: Image.Image, answer: Answer):
    html = view.looked(session_of(image, answer), 0, (2, 3), 1, SHORT)
    (label,) = [own["aria-label"] for tag, own in Tags(html).found if own.get("class") == "panel"]
    assert "layer 3, head 4" in label and f"“{answer.tokens[0].strip()}”" in label and "% from the left" in label


def test_the_json_holds_the_numbers_and_nothing_else(image: Image.Image, answer: Answer):
    session = session_of(image, answer)
    session.set_region(box_region((10, 20, 50, 60), image))
    found = json.loads(view.as_json(session, "selected", [2], SHORT))
    assert set(found) == {"image", "region", "settings", "answers"} and found["answers"][0]["hidden"] == []
    (own,) = found["answers"]
    assert (own["question"], own["answer"], own["model"]) == (QUESTION, answer.text, BASE)
    np.testing.assert_allclose(np.mean(own["map_per_token"], 0), own["map"], rtol=5e-3, atol=1e-5)
    assert len(own["token_boxes"]) == len(own["map"]) == 100 and len(own["selected_heads"]) == 16
    assert set(own["chosen"]) == {"word", "coverage", "intensity", "attention_mass", "pointing", "patch_auroc"}


def test_a_question_is_asked_again_with_parts_hidden(asker: Asker, image: Image.Image, answer: Answer):
    session = session_of(image, answer)
    assert list(ask_hidden(asker, session, answer, "mean")) == []  # without a region
    session.set_region(box_region((10, 20, 50, 60), image))
    found = session.hidden[0] = list(ask_hidden(asker, session, answer, "mean"))
    assert [one.part for one in found] == ["inside", "elsewhere", "outside"]
    for one, hidden in zip(found, hidden_parts(image, session.region.mask, SHORT.dilation).values(), strict=False):
        assert one.changed == (normalise(one.text) != normalise(answer.text))
        if one.part == "inside":
            again = ask(asker, occlude(image, hidden, "mean"))
            assert one.text == again.text
            assert (one.picture[hidden] == one.picture[hidden][0]).all() and not hidden[0, 0]
    tags = Tags(view.hidden(session, 0))
    assert sum(own.get("class") == "panel" for _, own in tags.found) == 3 and "All but the region hidden: " in tags.text
    assert "another answer" in tags.text or "the same answer" in tags.text
    (own,) = json.loads(view.as_json(session, "selected", [WHOLE], SHORT))["answers"]
    assert [one["answer"] for one in own["hidden"]] == [one.text for one in found]
    session.set_region(None)
    assert session.hidden == {} and view.hidden(session, 0) == ""


@pytest.mark.parametrize(
    ("host", "inside"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.5", False), ("pc", False)],
)
def test_a_server_for_other_machines_is_warned_of(host: str, inside: bool, monkeypatch: pytest.MonkeyPatch):
    served: list[tuple] = []
    monkeypatch.setattr(server, "serve", lambda *arguments: served.append(arguments))
    monkeypatch.setattr(command, "check_host", lambda host, port: None)  # whose addresses these are
    result = CliRunner().invoke(app, ["app", "--host", host, "--port", "7999"])
    assert result.exit_code == 0 and served[0][2:4] == (host, 7999)
    assert ("without a password" in " ".join(result.output.split())) is not inside


def test_the_command_refuses_what_does_not_fit_on_the_page(tmp_path: Path):
    adapters = [argument for name in "abc" for argument in ("--adapter", str(tmp_path / name))]
    result = CliRunner().invoke(app, ["app", *adapters])
    assert result.exit_code == 2 and f"at most {command.MOST}" in result.output
    result = CliRunner().invoke(app, ["app", *adapters[:2], "--dry-run"])
    assert result.exit_code == 0 and "serve tiny and a on 127.0.0.1" in result.output


def test_a_port_that_is_taken_is_told_before_models_are_loaded():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        result = CliRunner().invoke(app, ["app", "--port", str(taken)])
        assert result.exit_code == 2 and f"port {taken}: cannot listen on 127.0.0.1" in result.output
    host.check_host(host.LOOPBACK, taken)


def test_an_address_of_ipv6_is_told_at_once():
    for address in ("::", "::1"):
        result = CliRunner().invoke(app, ["app", "--host", address])
        assert result.exit_code == 2 and "address of IPv4" in " ".join(result.output.split())


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ModelError, match=r"a3tune\[app\]"):
        server.serve(load_config(None), {}, host.LOOPBACK, None, print)


def test_the_examples_ask_what_the_demos_adapters_have_learnt():
    assert {*KINDS} == {*read_recipe().questions, "modality"}
