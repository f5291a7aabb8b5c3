"""The one teacher-forced pass: what it tells the model, and what comes out."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from a3tune.attention.capture import capture_request, stack
from a3tune.compat.generation import CACHE
from a3tune.vlm.encode import prepare
from a3tune.vlm.load import Vlm, load_vlm
from a3tune.vlm.look import answer_text, look, model_inputs


@pytest.fixture(scope="module")
def vlm(vlm_folder: Path) -> Vlm:
    return load_vlm(vlm_folder, device="cpu")


def inputs_of(vlm: Vlm) -> tuple:
    image = Image.new("RGB", (48, 48), "gray")
    examples = [prepare(vlm, [image], "Which organ?", answer) for answer in ("liver", "the left lung")]
    return model_inputs(vlm, examples, "right")


@torch.no_grad()
def test_a_look_is_the_models_own_pass_and_what_was_asked_for(vlm: Vlm) -> None:
    inputs, masks = inputs_of(vlm)
    assert not {*masks, "labels"} & inputs.keys()
    plain = vlm.model(**inputs, use_cache=False).logits
    unseen = look(vlm.model, inputs, masks)
    assert torch.equal(unseen.logits, plain)
    assert unseen.get(CACHE) is None
    request = capture_request("answer", **masks)
    seen = look(vlm.model, inputs, masks, request, logits_to_keep=1)
    torch.testing.assert_close(seen.logits, plain[:, -1:])
    captured = stack(seen.attentions, request)
    text = vlm.model.config.text_config
    assert captured.map_BLHN.shape[:3] == (2, text.num_hidden_layers, text.num_attention_heads)
    assert captured.counted_B.all() and (captured.ratio_BLH > 0).all()


def test_what_travels_beside_the_inputs(vlm: Vlm) -> None:
    _, masks = inputs_of(vlm)
    request = capture_request("answer", **masks)
    bare = look(dict, {"input_ids": 1}, masks, routed=False)
    assert bare == {"input_ids": 1, "use_cache": False}
    told = look(dict, {"input_ids": 1}, masks, request, num_items_in_batch=3)
    assert told["capture"] is request and told["output_attentions"] and told["num_items_in_batch"] == 3
    assert told["routing"].prompt_mask is masks["prompt_mask"] and told["routing"].image_mask is masks["image_mask"]


def test_the_text_of_an_answer_ends_where_answers_end(vlm: Vlm) -> None:
    tokens = vlm.tokenizer("left lung", add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    ended = torch.cat([tokens, torch.tensor([vlm.tokenizer.eos_token_id])])
    assert answer_text(vlm, ended) == answer_text(vlm, tokens) == "left lung"
    model = SimpleNamespace(generation_config=SimpleNamespace(stop_strings=[" lung"]))
    assert answer_text(Vlm(model, vlm.processor, "tiny"), ended) == "left"  # type: ignore[arg-type]
