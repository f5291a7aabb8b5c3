"""Processors of families that also take videos, with and without the packages for videos."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoConfig, AutoProcessor, Qwen2VLProcessor
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string
from transformers.utils import is_torchvision_available

from a3tune.vlm import processor
from a3tune.vlm.processor import image_only, load_processor
from zoo import ZOO


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in ("qwen2_vl", "internvl", "smolvlm", "idefics3"):
        ZOO[name](root / name)
    return {path.name: path for path in root.iterdir()}


def load(folder: Path) -> Any:
    return load_processor(str(folder), AutoConfig.from_pretrained(folder))


@pytest.mark.skipif(is_torchvision_available(), reason="the whole processor can be loaded")
@pytest.mark.parametrize("name", ["qwen2_vl", "internvl"])
def test_the_image_half_is_loaded_where_transformers_refuses_the_whole(name: str, folders: dict[str, Path]) -> None:
    with pytest.raises((ImportError, ValueError), match=r"(?i)torchvision"):
        AutoProcessor.from_pretrained(folders[name])
    found = load(folders[name])
    assert not hasattr(found, "video_processor")
    assert found.chat_template
    inputs = found(text=[found.image_token], images=[Image.new("RGB", (50, 40))], return_tensors="pt")
    assert (inputs["input_ids"] == found.image_token_id).sum() > 1


def test_settings_of_the_processor_itself_are_read(folders: dict[str, Path]) -> None:
    assert load(folders["internvl"]).image_seq_length == 16


def test_the_image_half_keeps_its_name_in_files(folders: dict[str, Path], tmp_path: Path) -> None:
    half = image_only("qwen2_vl", Qwen2VLProcessor)
    assert issubclass(half, Qwen2VLProcessor)
    half.from_pretrained(folders["qwen2_vl"]).save_pretrained(tmp_path)
    assert '"processor_class": "Qwen2VLProcessor"' in (tmp_path / "processor_config.json").read_text()


@pytest.mark.parametrize(
    ("name", "torchvision", "num2words", "whole"),
    [
        ("idefics3", False, False, True),
        ("qwen2_vl", False, True, False),
        ("qwen2_vl", True, False, True),
        ("smolvlm", True, False, False),
        ("smolvlm", True, True, True),
    ],
)
def test_the_whole_processor_is_loaded_where_it_can_be(
    name: str,
    torchvision: bool,
    num2words: bool,
    whole: bool,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processor, "is_torchvision_available", lambda: torchvision)
    monkeypatch.setattr(processor, "is_num2words_available", lambda: num2words)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda source, **options: "whole")
    assert (load(folders[name]) == "whole") == whole


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (1, 3), (2, 2)])
def test_smolvlms_substitute_writes_what_smolvlm_writes(rows: int, columns: int, folders: dict[str, Path]) -> None:
    found = load(folders["smolvlm"])
    expected = get_image_prompt_string(
        rows, columns, 16, "<fake_token_around_image>", image_token="<image>", global_image_token="<global-img>"
    )
    assert found.replace_image_token({"rows": [[rows]], "cols": [[columns]]}, 0) == expected
