"""Converting published checkpoints: the same numbers, the same tokens, and nothing written from what is not whole."""

import json
import pickle
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration, Qwen2Tokenizer

from a3tune.convert import KINDS, convert, detect
from a3tune.convert.sentencepiece import _parse, read_sentencepiece
from a3tune.convert.stream import open_checkpoint, write_checkpoint
from a3tune.errors import ModelError, OutputError, RunError
from a3tune.machine.files import locked
from a3tune.vlm.encode import encode
from a3tune.vlm.grids import token_boxes
from a3tune.vlm.load import Vlm, load_vlm
from checkpoints import Reference, edit, huatuo, llava_med, llava_med_15, sentencepiece_message, write_sentencepiece

QUESTION = "What organ is this?"
PATCHES = 16
Tokenize = Callable[[str], list[int]]
"""A text -> ids, without any beginning token: what the original code calls on each chunk."""


class Case:
    """A published checkpoint and what became of it."""

    def __init__(self, root: Path, kind: str) -> None:
        self.kind, self.source, self.out = kind, root / "source", root / "out"
        self.extra: dict[str, Path] = {}
        if kind == "llava_med":
            self.extra = {"base": root / "base", "tower": root / "tower"}
            self.reference: Reference = llava_med(self.source, **self.extra)
        else:
            self.reference = {"llava_med_15": llava_med_15, "huatuo": huatuo}[kind](self.source)
        self.steps: list[tuple[int, int]] = []
        self.converted = convert(self.source, self.out, **self.extra, progress=lambda *step: self.steps.append(step))
        self.vlm: Vlm = load_vlm(self.out, device="cpu")


@pytest.fixture(scope="module", params=list(KINDS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), request.param)


def test_the_kind_is_found_and_told(case: Case) -> None:
    assert detect(case.source) == case.kind == case.converted.kind
    assert case.steps[-1] == (case.converted.tensors, case.converted.tensors)


def test_nothing_is_missing_and_nothing_left_over(case: Case) -> None:
    _, report = LlavaForConditionalGeneration.from_pretrained(case.out, output_loading_info=True)
    assert {name: report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")} == {
        "missing_keys": set(),
        "unexpected_keys": set(),
        "mismatched_keys": set(),
    }


def test_logits_are_those_of_the_original(case: Case) -> None:
    # In double precision: the order of sums does not hide a difference.
    vlm = load_vlm(case.out, device="cpu", dtype=torch.float64)
    inputs = encode(vlm, [image(28, 28)], [QUESTION])
    pixels = inputs["pixel_values"].double()
    expected = case.reference.double().logits(original_ids(case, QUESTION), pixels)
    with torch.no_grad():
        got = vlm.model(inputs["input_ids"], pixels, inputs["attention_mask"]).logits[0]
    got = got[:, : expected.shape[1]]  # rows for new tokens come last
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-6


def test_weights_keep_their_precision(case: Case) -> None:
    expected = {"llava_med_15": torch.bfloat16}.get(case.kind, torch.float16)
    tensors = open_checkpoint(case.out).tensors.values()
    assert {tensor.dtype for tensor in tensors if "vision_tower" not in tensor.name} == {expected}
    assert json.loads((case.out / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")


@pytest.mark.parametrize("question", [QUESTION, "Ünïcode, 北京 and  two spaces?", "a\nb", "Is it [left] or ### right?"])
def test_prompts_have_the_original_token_ids(case: Case, question: str) -> None:
    ids = encode(case.vlm, [image(40, 28)], [question])["input_ids"][0].tolist()
    assert collapsed(case, ids) == original_ids(case, question)


def test_prompts_read_as_published(case: Case) -> None:
    published = {
        "llava_med_15": "[INST] <image>\n{} [/INST]",
        "huatuo": "<|user|>\n<image>\n{}\n<|assistant|>\n",
        "llava_med": "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the human's questions.###Human: Hi!###Assistant: Hi there!  How can "
        "I help you today?\n###Human: {}\n<im_start><im_patch><im_end>###Assistant:",
    }[case.kind]
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    rendered = case.vlm.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert (
        rendered
        == published.format(QUESTION)
        == original_prompt(case.kind, QUESTION).replace("<image>", case.vlm.processor.image_token)
    )


def test_answers_follow_the_prompt_and_end(case: Case) -> None:
    tokenizer = case.vlm.tokenizer
    inputs = encode(case.vlm, [image(28, 28)], [QUESTION], ["the left lung"])
    answer = inputs["input_ids"][0][inputs["answer_mask"][0]].tolist()
    assert answer[-1] == tokenizer.eos_token_id
    stop = "###" if case.kind == "llava_med" else ""
    assert tokenizer.decode(answer[:-1]).strip() == "the left lung" + stop


def test_images_become_what_the_original_made_of_them(case: Case) -> None:
    wide = image(48, 20)
    pixels = encode(case.vlm, [wide], [QUESTION])["pixel_values"][0]
    boxes = token_boxes(case.vlm, wide.height, wide.width)
    assert len(boxes) == PATCHES
    if case.kind == "llava_med":  # resized and cropped: the sides are not seen
        assert boxes[:, 0].min() > 0 and boxes[:, 2].max() < wide.width
    else:  # padded to a square in the mean colour: everything is seen
        assert boxes[:, 0].min() == 0 and boxes[:, 2].max() == wide.width
        assert boxes[:, 1].min() == -14
        mean = torch.tensor([int(255 * value) for value in case.vlm.processor.image_processor.image_mean]) / 255
        std = torch.tensor(case.vlm.processor.image_processor.image_std)
        expected = (mean - torch.tensor(case.vlm.processor.image_processor.image_mean)) / std
        assert torch.allclose(pixels[:, 0, 0], expected, atol=0.02)


def test_generation_ends_where_the_original_does(case: Case) -> None:
    generation = case.vlm.model.generation_config
    assert generation.eos_token_id == case.vlm.tokenizer.eos_token_id
    assert generation.stop_strings == (["###"] if case.kind == "llava_med" else None)
    inputs = encode(case.vlm, [image(28, 28)], [QUESTION])
    with torch.no_grad():
        generated = case.vlm.model.generate(
            **{name: inputs[name] for name in ("input_ids", "pixel_values", "attention_mask")},
            do_sample=False,
            max_new_tokens=5,
            tokenizer=case.vlm.tokenizer,
        )
    assert generated.shape[1] > inputs["input_ids"].shape[1]


def test_added_rows_are_never_generated(case: Case) -> None:
    rows = case.vlm.model.config.text_config.vocab_size
    had = case.reference.language.config.vocab_size
    assert case.vlm.model.generation_config.suppress_tokens == (list(range(had, rows)) or None)
    assert (rows > had) == (case.kind == "llava_med_15")
    assert case.vlm.model.config.image_token_id < rows


def test_several_shards_hold_the_same(case: Case, tmp_path: Path) -> None:
    tensors = list(open_checkpoint(case.out).tensors.values())
    write_checkpoint(tensors, tmp_path, lambda done, total: None, shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    (tmp_path / "config.json").write_text((case.out / "config.json").read_text())
    again = open_checkpoint(tmp_path).tensors
    assert set(again) == {tensor.name for tensor in tensors}
    assert all(torch.equal(again[tensor.name].read(), tensor.read()) for tensor in tensors)


@given(st.text())
def test_sentencepiece_vocabularies_give_sentencepiece_ids(text: str) -> None:
    tokenizer, reference = SENTENCEPIECE
    assert tokenizer.encode(text).ids == reference(text)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    llava_med_15(tmp_path / "source")
    (tmp_path / "source" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"the shard model-00002-of-00002\.safetensors is missing"):
        convert(tmp_path / "source", tmp_path / "out")
    assert not left(tmp_path)


@pytest.mark.parametrize("keep", [5, 200, 100_000])
def test_a_truncated_shard_is_named(tmp_path: Path, keep: int) -> None:
    llava_med_15(tmp_path / "source", shards=1)
    weights = tmp_path / "source" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors: expected whole weights"):
        convert(tmp_path / "source", tmp_path / "out")
    assert not left(tmp_path)


def test_a_truncated_bin_is_named(tmp_path: Path) -> None:
    extra = {"base": tmp_path / "base", "tower": tmp_path / "tower"}
    llava_med(tmp_path / "source", **extra)
    weights = tmp_path / "source" / "pytorch_model-00001-of-00002.bin"
    weights.write_bytes(weights.read_bytes()[:4000])
    with pytest.raises(ModelError, match=r"pytorch_model-00001-of-00002\.bin: expected whole weights"):
        convert(tmp_path / "source", tmp_path / "out", **extra)


def test_code_in_a_bin_is_not_run(tmp_path: Path) -> None:
    llava_med_15(tmp_path / "source", shards=1)
    (tmp_path / "source" / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Malicious(tmp_path / "touched")}, tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "touched").exists()


def test_unknown_families_are_told_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava_mpt"}')
    with pytest.raises(ModelError, match=r"'llava_mpt' cannot be converted; known kinds: llava_med \(.*llava_med_15.*"):
        convert(tmp_path, tmp_path / "out")


def test_an_already_converted_model_is_told_apart(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="transformers' format"):
        convert(case.out, tmp_path / "out")


def test_a_delta_needs_its_base_and_its_tower(tmp_path: Path) -> None:
    extra = {"base": tmp_path / "base", "tower": tmp_path / "tower"}
    llava_med(tmp_path / "source", **extra)
    with pytest.raises(ModelError, match="only the differences from LLaMA-7B"):
        convert(tmp_path / "source", tmp_path / "out", tower=extra["tower"])
    with pytest.raises(ModelError, match="holds no vision tower"):
        convert(tmp_path / "source", tmp_path / "out", base=extra["base"])


@pytest.mark.parametrize(("change", "message"), [({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05 instead of 1e-06")])
def test_another_base_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    extra = {"base": tmp_path / "base", "tower": tmp_path / "tower"}
    llava_med(tmp_path / "source", **extra)
    edit(extra["base"] / "config.json", **change)
    with pytest.raises(ModelError, match=message):
        convert(tmp_path / "source", tmp_path / "out", **extra)


def test_a_base_of_another_shape_is_refused(tmp_path: Path) -> None:
    extra = {"base": tmp_path / "base", "tower": tmp_path / "tower"}
    llava_med(tmp_path / "source", **extra)
    torch.save({"model.norm.weight": torch.zeros(8)}, extra["base"] / "pytorch_model.bin")
    (extra["base"] / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(ModelError, match="not the base of this delta"):
        convert(tmp_path / "source", tmp_path / "out", **extra)


def test_a_second_tower_is_refused(tmp_path: Path) -> None:
    llava_med_15(tmp_path / "source")
    with pytest.raises(ModelError, match="has a vision tower of its own"):
        convert(tmp_path / "source", tmp_path / "out", tower=tmp_path / "source")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, r"layers\.2\..* should have shape .* found none"),
        ({"intermediate_size": 40}, r"mlp\.\w+_proj\.weight should have shape"),
        ({"mm_projector_type": "mlp3x_gelu"}, "expected 'linear' or 'mlp2x_gelu', got 'mlp3x_gelu'"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    llava_med_15(tmp_path / "source", config=change)
    with pytest.raises(ModelError, match=message):
        convert(tmp_path / "source", tmp_path / "out")
    assert not left(tmp_path)


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    llava_med_15(tmp_path / "source", shards=1)
    file = tmp_path / "source" / "model.safetensors"
    with safe_open(file, "pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    save_file(tensors | {"model.vision_resampler.query": torch.zeros(2)}, file)
    with pytest.raises(ModelError, match=r"unexpected tensor 'model\.vision_resampler\.query'"):
        convert(tmp_path / "source", tmp_path / "out")


def test_tokens_of_another_model_are_refused(tmp_path: Path) -> None:
    llava_med_15(tmp_path / "source")
    (tmp_path / "source" / "added_tokens.json").write_text('{"<pad>": 40000}')
    with pytest.raises(ModelError, match="'<pad>' should have id 40000"):
        convert(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize(
    "content", [b"no protobuf at all", sentencepiece_message([("<unk>", 0.0, 2)], model_type=1), b""]
)
def test_other_tokenizer_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer\.model: expected"):
        read_sentencepiece(tmp_path / "tokenizer.model")


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    llava_med_15(tmp_path / "source")
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    for force in (False, True):
        with pytest.raises(OutputError, match=r"is there already|is not replaced"):
            convert(tmp_path / "source", out, force=force)
    with pytest.raises(OutputError, match="is not replaced"):
        convert(tmp_path / "source", tmp_path / "source", force=True)
    assert (out / "precious").read_text() == "mine"


def test_a_converted_model_is_replaced_when_asked(tmp_path: Path) -> None:
    llava_med_15(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    (tmp_path / "out" / "stale").write_text("old")
    convert(tmp_path / "source", tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "stale").exists()
    assert left(tmp_path) == {"out"}


def test_a_stopped_conversion_leaves_nothing(tmp_path: Path) -> None:
    llava_med_15(tmp_path / "source")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "source", tmp_path / "out", progress=stop)
    assert not left(tmp_path)


def test_two_conversions_do_not_mix(tmp_path: Path) -> None:
    llava_med_15(tmp_path / "source")
    with locked(tmp_path / ".out.unfinished"), pytest.raises(RunError, match="in use by another run"):
        convert(tmp_path / "source", tmp_path / "out")


def test_what_a_killed_conversion_left_is_taken_over(tmp_path: Path) -> None:
    llava_med_15(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    work = tmp_path / ".out.unfinished"
    (work / "new").mkdir(parents=True)
    (work / "new" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "out").rename(work / "old")
    with pytest.raises(OutputError, match="is there already"):
        convert(tmp_path / "source", tmp_path / "out")
    assert left(tmp_path) == {"out"}
    assert (tmp_path / "out" / "config.json").is_file()


class Malicious:
    """Would touch a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_malicious_pickles_would_work_otherwise(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malicious(tmp_path / "touched")))  # noqa: S301
    assert (tmp_path / "touched").exists()


def image(width: int, height: int) -> Image.Image:
    return Image.radial_gradient("L").resize((width, height)).convert("RGB")


def left(folder: Path) -> set[str]:
    """What a conversion left beside its inputs."""
    return {path.name for path in folder.iterdir()} - {"source", "base", "tower"}


def original_prompt(kind: str, question: str) -> str:
    """What the published code puts around a question, with <image> where it puts the image."""
    if kind == "llava_med_15":
        return f"[INST] <image>\n{question} [/INST]"
    if kind == "huatuo":
        return f"<|user|>\n<image>\n{question}\n<|assistant|>\n"
    system = (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions."
    )
    turns = [("Human", "Hi!"), ("Assistant", "Hi there!  How can I help you today?\n")]
    turns += [("Human", f"{question}\n<im_start><image><im_end>")]
    return system + "###" + "".join(f"{role}: {text}###" for role, text in turns) + "Assistant:"


def original_ids(case: Case, question: str) -> list[int]:
    """The original algorithm: tokenise the chunks around <image> one by one, with the sentinel -200 between them.

    The first LLaVA-Med has no sentinel, but special tokens that part the text just so.
    """
    prompt = original_prompt(case.kind, question)
    if case.kind == "huatuo":
        tokenizer = Qwen2Tokenizer.from_pretrained(case.source)
        before, after = (tokenizer(chunk, add_special_tokens=False)["input_ids"] for chunk in prompt.split("<image>"))
        return [*before, -200, *after]
    tokenize = plain_sentencepiece(case.source)
    if case.kind == "llava_med_15":
        before, after = (tokenize(chunk) for chunk in prompt.split("<image>"))
        return [1, *before, -200, *after]
    special = json.loads((case.source / "added_tokens.json").read_text())
    before, after = prompt.split("<im_start><image><im_end>")
    return [1, *tokenize(before), special["<im_start>"], -200, special["<im_end>"], *tokenize(after)]


def collapsed(case: Case, ids: list[int]) -> list[int]:
    """The run of image tokens as one sentinel."""
    token = case.vlm.model.config.image_token_id
    at = ids.index(token)
    assert ids[at : at + PATCHES] == [token] * PATCHES and ids.count(token) == PATCHES
    return [*ids[:at], -200, *ids[at + PATCHES :]]


def plain_sentencepiece(folder: Path) -> Tokenize:
    """sentencepiece's algorithm, slow and obvious: merge the adjacent pair that makes the piece of the best score."""
    pieces = read_pieces(folder)
    scores = {text: score for text, score, kind in pieces if kind == 1}
    ids = {text: index for index, (text, _, _) in enumerate(pieces)}

    def tokenize(text: str) -> list[int]:
        parts = list("▁" + text.replace(" ", "▁")) if text else []
        while True:
            pairs = [(scores[a + b], -at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
            if not pairs:
                break
            at = -max(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        known = [
            [ids[part]] if part in scores else [ids[f"<0x{byte:02X}>"] for byte in part.encode()] for part in parts
        ]
        return [index for part in known for index in part]

    return tokenize


def read_pieces(folder: Path) -> list[tuple[str, float, int]]:
    return [tuple(piece) for piece in _parse((folder / "tokenizer.model").read_bytes())[0]]


def _sentencepiece_pair() -> tuple:
    with tempfile.TemporaryDirectory() as folder:
        write_sentencepiece(Path(folder))
        return read_sentencepiece(Path(folder) / "tokenizer.model"), plain_sentencepiece(Path(folder))


SENTENCEPIECE = _sentencepiece_pair()
