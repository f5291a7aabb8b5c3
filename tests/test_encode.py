"""Token masks, padding, image placement, and texts that would break them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from a3tune.errors import DataError, ModelError
from a3tune.vlm.encode import TOKEN_MASKS, encode, end_token_id
from a3tune.vlm.load import Vlm
from a3tune.vlm.tiny import random_vlm, tiny_processor, train_tokenizer

PATCHES = 16
IMAGE = Image.new("RGB", (60, 48), "gray")
TEXTS = [
    "What is shown in the liver?",
    "USER: Where is the lesion? ASSISTANT: left lung",
    "yes",
    "no mass in the brain",
]


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    processor = tiny_processor(train_tokenizer(TEXTS), image_size=48)
    return Vlm(random_vlm(hidden=32, layers=1, heads=2, kv_heads=1, image_size=48), processor, "tiny")


def text(vlm: Vlm, ids: torch.Tensor) -> str:
    return vlm.tokenizer.decode(ids)


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_split_every_real_token(vlm: Vlm, side: str) -> None:
    prompts = ["Where is the lesion?", "What?"]
    batch = encode(vlm, [IMAGE, IMAGE], prompts, ["left lung", "no"], padding_side=side)
    image, prompt, answer, placed = (batch[name] for name in TOKEN_MASKS)
    assert torch.equal(placed, image)
    assert torch.equal(image.int() + prompt.int() + answer.int(), batch["attention_mask"].int())
    assert image.sum(1).tolist() == [PATCHES, PATCHES]
    for row, (asked, answered) in enumerate(zip(prompts, ["left lung", "no"], strict=True)):
        assert text(vlm, batch["input_ids"][row][prompt[row]]) == f"USER: \n{asked} ASSISTANT:"
        assert text(vlm, batch["input_ids"][row][answer[row]]) == f" {answered}</s>"
    assert torch.equal(batch["labels"], batch["input_ids"].where(answer, -100))
    edge = 0 if side == "right" else -1
    assert batch["attention_mask"][:, edge].all()
    assert not batch["attention_mask"].all()


def test_prompt_is_the_same_with_and_without_an_answer(vlm: Vlm) -> None:
    asked = encode(vlm, [IMAGE], ["Where?"])
    learnt = encode(vlm, [IMAGE], ["Where?"], ["left lung"])
    length = asked["input_ids"].shape[1]
    assert torch.equal(learnt["input_ids"][:, :length], asked["input_ids"])
    assert not asked["answer_mask"].any()
    assert "labels" not in asked


def test_padding_does_not_change_what_the_model_says(vlm: Vlm) -> None:
    prompts, answers = ["Where is the lesion?", "What?"], ["left lung", "no"]
    alone = encode(vlm, [IMAGE], prompts[1:], answers[1:])
    with torch.no_grad():
        expected = vlm.model(**without_masks(alone)).logits[0]
        for side in ("left", "right"):
            batch = encode(vlm, [IMAGE, IMAGE], prompts, answers, padding_side=side)
            logits = vlm.model(**without_masks(batch)).logits[1][batch["attention_mask"][1].bool()]
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def without_masks(batch: dict) -> dict:
    return {key: value for key, value in batch.items() if key not in TOKEN_MASKS}


def test_the_image_stands_where_the_prompt_puts_it(vlm: Vlm) -> None:
    first = encode(vlm, [IMAGE], ["Where is the lesion?"])
    after = encode(vlm, [IMAGE], ["Where is the lesion?\n<image>"])
    assert text(vlm, first["input_ids"][0]).index("<image>") < text(vlm, first["input_ids"][0]).index("Where")
    assert text(vlm, after["input_ids"][0]) == "USER: Where is the lesion?\n" + "<image>" * PATCHES + " ASSISTANT:"


def test_several_images_and_none(vlm: Vlm) -> None:
    batch = encode(vlm, [[IMAGE, IMAGE], [], [IMAGE]], ["<image> and <image>?", "no image", "one"])
    assert batch["image_mask"].sum(1).tolist() == [2 * PATCHES, 0, PATCHES]
    assert batch["pixel_values"].shape == (3, 3, 48, 48)
    assert "pixel_values" not in encode(vlm, [[]], ["no image"])


@pytest.mark.parametrize("prompt", ["<image> and <image>?", "<image><image><image>"])
def test_more_places_than_images_is_an_error(vlm: Vlm, prompt: str) -> None:
    with pytest.raises(DataError, match=r"stands in it \d times, but the sample has 1 image"):
        encode(vlm, [IMAGE], [prompt])


@pytest.mark.parametrize("control", ["</s>", "<pad>", "<s>"])
def test_control_tokens_in_user_text_are_an_error(vlm: Vlm, control: str) -> None:
    with pytest.raises(DataError, match=f"prompt .*{control}.* is a control token"):
        encode(vlm, [IMAGE], [f"ignore this {control} and"])
    with pytest.raises(DataError, match=r"answer .* is a control token"):
        encode(vlm, [IMAGE], ["Where?"], [f"here{control}"])


def test_an_image_in_the_answer_is_an_error(vlm: Vlm) -> None:
    with pytest.raises(DataError, match=r"answer .* is a control token"):
        encode(vlm, [IMAGE], ["Where?"], ["<image>"])


def test_too_long_a_prompt_is_an_error(vlm: Vlm) -> None:
    with pytest.raises(DataError, match="the model takes 1024"):
        encode(vlm, [IMAGE], ["lesion " * 1024])


def test_an_empty_answer_is_only_the_end_token(vlm: Vlm) -> None:
    batch = encode(vlm, [IMAGE], ["Where?"], [""])
    assert batch["input_ids"][batch["answer_mask"]].tolist() == [vlm.tokenizer.eos_token_id]


def test_no_token_spans_the_border_of_prompt_and_answer(vlm: Vlm) -> None:
    processor = tiny_processor(train_tokenizer(["ASSISTANTyes"] * 50), image_size=48)
    processor.chat_template = vlm.processor.chat_template.replace("| upper }}: ", "| upper }}").replace("TANT:", "TANT")
    merging = Vlm(vlm.model, processor, "merging")
    assert processor.tokenizer.tokenize("ASSISTANTyes") == ["ASSISTANTyes"]
    asked = encode(merging, [IMAGE], ["Where?"])["input_ids"][0]
    learnt = encode(merging, [IMAGE], ["Where?"], ["yes"])
    assert torch.equal(learnt["input_ids"][0][: len(asked)], asked)
    assert text(merging, learnt["input_ids"][learnt["answer_mask"]]) == "yes</s>"


def test_a_model_without_template_says_so(vlm: Vlm) -> None:
    bare = Vlm(vlm.model, tiny_processor(vlm.tokenizer, image_size=48), "bare")
    bare.processor.chat_template = None
    with pytest.raises(ModelError, match="chat template"):
        encode(bare, [IMAGE], ["Where?"])


def test_a_template_that_fails_is_told(vlm: Vlm) -> None:
    for template in ("{{ 1 / 0 }}", "{{ messages[9].x.y }}", "{% if %}"):
        with pytest.raises(ModelError, match="its chat template fails"):
            encode(with_template(vlm, template), [IMAGE], ["Where?"])


def with_template(vlm: Vlm, template: str) -> Vlm:
    processor = tiny_processor(vlm.tokenizer, image_size=48)
    processor.chat_template = template
    return Vlm(vlm.model, processor, "other")


def test_control_tokens_are_not_the_prompt(vlm: Vlm) -> None:
    turns = "{% for m in messages %}<s>{{ m.role }} {% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}</s>"
    marked = with_template(vlm, turns + "{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}")
    batch = encode(marked, [IMAGE], ["Where?"], ["yes"])
    ids = batch["input_ids"][0]
    assert text(marked, ids[batch["prompt_mask"][0]]) == "user Where?assistant "
    assert text(marked, ids[batch["answer_mask"][0]]) == "yes</s>"
    left = ids[~(batch["prompt_mask"] | batch["answer_mask"] | batch["image_mask"])[0]]
    assert text(marked, left) == "<s></s><s>"


def test_the_answer_ends_as_the_template_ends_it(vlm: Vlm) -> None:
    turns = "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}<s>"
    other = with_template(vlm, turns + "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
    batch = encode(other, [IMAGE], ["Where?"], ["yes"])
    assert text(other, batch["input_ids"][batch["answer_mask"]]) == " yes<s>"
    assert vlm.tokenizer.convert_ids_to_tokens(end_token_id(other)) == "<s>"
    assert vlm.tokenizer.convert_ids_to_tokens(end_token_id(vlm)) == "</s>"


def test_an_image_in_the_prompt_keeps_the_borders_of_the_template(vlm: Vlm) -> None:
    turns = "{% for m in messages %}Q{% for p in m.content %}{{ p.text or '<s><image></s>' }}{% endfor %}{% endfor %}"
    framed = with_template(vlm, turns + "{% if add_generation_prompt %}A{% endif %}")
    ids = encode(framed, [IMAGE], ["Where? <image>"])["input_ids"][0]
    assert text(framed, ids) == "QWhere? <s>" + "<image>" * PATCHES + "</s>A"


def test_boxes_that_are_not_the_image_tokens_are_an_error(vlm: Vlm) -> None:
    processor = tiny_processor(vlm.tokenizer, image_size=48)
    processor.patch_size = 24
    with pytest.raises(ModelError, match="makes 4 image tokens of 60 x 48 pixels, its configuration 16"):
        encode(Vlm(vlm.model, processor, "wrong"), [IMAGE], ["Where?"])


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_text_comes_back(vlm: Vlm, prompt: str, answer: str) -> None:
    if any(token in prompt + answer for token in vlm.tokenizer.all_special_tokens):
        return
    batch = encode(vlm, [IMAGE], [prompt], [answer])
    assert text(vlm, batch["input_ids"][batch["prompt_mask"]]) == f"USER: \n{prompt} ASSISTANT:"
    assert text(vlm, batch["input_ids"][batch["answer_mask"]]) == f" {answer}".rstrip() + "</s>"
