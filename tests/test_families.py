"""Every supported family does everything that a3tune needs of it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from a3tune.adapters import load_adapter
from a3tune.errors import DataError
from a3tune.vlm.encode import encode, prepare
from a3tune.vlm.families import FAMILIES
from a3tune.vlm.load import load_vlm
from a3tune.vlm.look import look, model_inputs
from zoo import ZOO
from zoo.checks import CHECKS, adapted, noise


@pytest.fixture(scope="session")
def zoo_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the zoo's models; each is filled when it is first asked for."""
    root = tmp_path_factory.mktemp("zoo")
    return {name: root / name for name in ZOO}


@pytest.fixture
def folder(name: str, zoo_folders: dict[str, Path]) -> Path:
    if not zoo_folders[name].exists():
        ZOO[name](zoo_folders[name])
    return zoo_folders[name]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ZOO)
def test_family(name: str, check: str, folder: Path) -> None:
    CHECKS[check](folder)


@pytest.mark.parametrize("name", ZOO)
def test_a_folder_loads_as_its_family(name: str, folder: Path) -> None:
    vlm = load_vlm(folder, device="cpu")
    assert name.startswith(vlm.model.config.model_type)
    assert not vlm.model.training


@pytest.mark.parametrize("name", ZOO)
def test_prompts_are_tokenised_as_transformers_does(name: str, folder: Path) -> None:
    vlm = load_vlm(folder, device="cpu")
    image = noise(48, 64)
    if vlm.family.chat:
        content = [{"type": "image", "image": image}, {"type": "text", "text": "Where is it?"}]
        expected = vlm.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        ours = encode(vlm, [image], ["Where is it?"])
    else:
        expected = vlm.processor(images=image, text="<image>Where is it?", suffix="here")
        expected = {key: torch.tensor(np.asarray(value)) for key, value in expected.items()}
        ours = encode(vlm, [image], ["Where is it?"], ["here"])
    for key, value in expected.items():
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_nothing_of_an_image_is_seen_where_all_of_its_tokens_are_hidden(name: str, folder: Path) -> None:
    vlm = load_vlm(folder, device="cpu")
    found = {}
    for seed in (0, 1):
        inputs, masks = model_inputs(vlm, [prepare(vlm, [noise(48, 64, seed)], "Where is it?", "left lung")], "right")
        nothing, everything = torch.zeros_like(masks["image_mask"]), masks["image_mask"]
        kept = inputs["input_ids"].shape[1] - int(everything.nonzero()[-1, 1]) - 1
        plain = look(vlm.model, inputs, masks).logits[:, -kept:]
        for hidden in (nothing, everything):
            found[seed, bool(hidden.any())] = look(vlm.model, inputs, masks, hidden=hidden).logits[:, -kept:]
        torch.testing.assert_close(found[seed, False], plain, atol=1e-4, rtol=1e-3)
    assert (found[0, False] - found[1, False]).abs().max() > 1e-4
    torch.testing.assert_close(found[0, True], found[1, True], atol=1e-5, rtol=1e-5)


def test_a_prompt_without_an_image_needs_a_chat_template(tmp_path: Path) -> None:
    ZOO["paligemma"](tmp_path)
    with pytest.raises(DataError, match="paligemma takes no prompt without an image"):
        encode(load_vlm(tmp_path, device="cpu"), [[]], ["Where is it?"])


def test_every_family_is_in_the_zoo() -> None:
    assert all(any(name.startswith(family) for name in ZOO) for family in FAMILIES)


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_line_ends_are_layout_inside_an_image_and_text_elsewhere(name: str, folder: Path) -> None:
    vlm = load_vlm(folder, device="cpu")
    batch = encode(vlm, [noise(48, 64)], ["What\n\nis\nit?"])
    ids, image, prompt = (batch[name][0] for name in ("input_ids", "image_mask", "prompt_mask"))
    inside = ids[image.nonzero().min() : image.nonzero().max()]
    assert torch.isin(inside, torch.tensor(vlm.layout_ids)).any()
    assert "What\n\nis\nit?" in vlm.tokenizer.decode(ids[prompt])


def test_an_adapter_that_names_no_layout_reads_prompts_as_it_learnt_to(tmp_path: Path, zoo_folders) -> None:
    folder = zoo_folders["idefics3"]
    if not folder.exists():
        ZOO["idefics3"](folder)
    vlm = adapted(folder)
    vlm.model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings.pop("layout_ids")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    bare = load_vlm(folder, device="cpu")
    older = replace(bare, model=load_adapter(load_vlm(folder, device="cpu").model, tmp_path))
    assert (older.layout_ids, bare.layout_ids) == ((), vlm.layout_ids)
    prompts = [encode(one, [noise(48, 64)], ["What?"])["prompt_mask"] for one in (older, vlm)]
    between = prompts[0] & ~prompts[1]
    assert between.any() and not (prompts[1] & ~prompts[0]).any()
    example = prepare(older, [noise(48, 64)], "What?")
    inputs, masks = model_inputs(older, [example], "left")
    with torch.no_grad():  # derived as in `generate`, and told as in training
        derived, told = older.model(**inputs), look(older.model, inputs, masks)
    torch.testing.assert_close(derived.logits, told.logits)
