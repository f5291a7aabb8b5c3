"""The port on synthetic checkpoints of the published layout; `parity/biomedclip.py` compares it with open_clip."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertTokenizer

from a3tune.errors import ModelError
from a3tune.labels.rank import make_ranker
from a3tune.labels.rank.biomedclip import BiomedClipRanker

WIDTH, PATCH, SIZE, CONTEXT, EMBED, WORDS = 64, 8, 32, 12, 16, ("liver", "lung", "the", "where", "is", "?")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def checkpoint(seed=0):
    """Names and shapes of open_clip's `CustomTextCLIP` with timm's ViT and a BERT, one layer each."""
    shapes = {
        "visual.trunk.cls_token": (1, 1, WIDTH),
        "visual.trunk.pos_embed": (1, (SIZE // PATCH) ** 2 + 1, WIDTH),
        "visual.trunk.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "visual.trunk.patch_embed.proj.bias": (WIDTH,),
        "visual.head.proj.weight": (EMBED, WIDTH),
        "text.proj.0.weight": (40, WIDTH),
        "text.proj.2.weight": (EMBED, 40),
        "text.transformer.embeddings.word_embeddings.weight": (len(SPECIAL) + len(WORDS), WIDTH),
        "text.transformer.embeddings.position_embeddings.weight": (CONTEXT, WIDTH),
        "text.transformer.embeddings.token_type_embeddings.weight": (2, WIDTH),
        "logit_scale": (),
    }
    block, layer = "visual.trunk.blocks.0.", "text.transformer.encoder.layer.0."
    for name, (out, into) in {
        f"{block}attn.qkv": (3 * WIDTH, WIDTH),
        f"{block}attn.proj": (WIDTH, WIDTH),
        f"{block}mlp.fc1": (96, WIDTH),
        f"{block}mlp.fc2": (WIDTH, 96),
        f"{layer}attention.self.query": (WIDTH, WIDTH),
        f"{layer}attention.self.key": (WIDTH, WIDTH),
        f"{layer}attention.self.value": (WIDTH, WIDTH),
        f"{layer}attention.output.dense": (WIDTH, WIDTH),
        f"{layer}intermediate.dense": (80, WIDTH),
        f"{layer}output.dense": (WIDTH, 80),
    }.items():
        shapes |= {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    norms = [f"{block}norm1", f"{block}norm2", "visual.trunk.norm", "text.transformer.embeddings.LayerNorm"]
    for name in [*norms, f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]:
        shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save(folder, weights, pickled=False):
    config = {
        "model_cfg": {
            "embed_dim": EMBED,
            "vision_cfg": {"timm_model_name": "vit", "timm_pool": "", "timm_proj": "linear", "image_size": SIZE},
            "text_cfg": {"hf_model_name": "bert", "context_length": CONTEXT},
        },
        "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(weights, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(weights, folder / "open_clip_model.safetensors")
    ids = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    BertTokenizer(tokenizer_object=tokenizer, vocab=ids).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("biomedclip"), checkpoint())


def norm(x, weights, name, eps):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention(query, key, value):
    return torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]), -1) @ value


def image_tower(weights, pixels):
    """timm's ViT with one block and one head, and open_clip's projection, from their equations."""
    trunk, block = "visual.trunk.", "visual.trunk.blocks.0."
    patches = torch.nn.functional.conv2d(
        pixels, weights[f"{trunk}patch_embed.proj.weight"], weights[f"{trunk}patch_embed.proj.bias"], stride=PATCH
    )
    x = torch.cat([weights[f"{trunk}cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = x + weights[f"{trunk}pos_embed"]
    mixed = attention(*linear(norm(x, weights, f"{block}norm1", 1e-6), weights, f"{block}attn.qkv").chunk(3, -1))
    x = x + linear(mixed, weights, f"{block}attn.proj")
    hidden = linear(norm(x, weights, f"{block}norm2", 1e-6), weights, f"{block}mlp.fc1")
    x = x + linear(torch.nn.functional.gelu(hidden), weights, f"{block}mlp.fc2")
    return norm(x, weights, f"{trunk}norm", 1e-6)[:, 0] @ weights["visual.head.proj.weight"].T


def text_tower(weights, ids):
    """BERT with one layer and one head, and open_clip's projection, from their equations."""
    text, layer = "text.transformer.", "text.transformer.encoder.layer.0."
    x = weights[f"{text}embeddings.word_embeddings.weight"][ids]
    x = x + weights[f"{text}embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(
        x + weights[f"{text}embeddings.token_type_embeddings.weight"][0], weights, f"{text}embeddings.LayerNorm", 1e-12
    )
    mixed = attention(*(linear(x, weights, f"{layer}attention.self.{part}") for part in ("query", "key", "value")))
    mixed = linear(mixed, weights, f"{layer}attention.output.dense")
    x = norm(x + mixed, weights, f"{layer}attention.output.LayerNorm", 1e-12)
    hidden = linear(
        torch.nn.functional.gelu(linear(x, weights, f"{layer}intermediate.dense")), weights, f"{layer}output.dense"
    )
    x = norm(x + hidden, weights, f"{layer}output.LayerNorm", 1e-12)
    return torch.nn.functional.gelu(x[0] @ weights["text.proj.0.weight"].T) @ weights["text.proj.2.weight"].T


def test_both_towers_are_the_published_architecture(folder):
    weights, ranker = checkpoint(), BiomedClipRanker(folder, device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8))
    values = (np.asarray(image, np.float32) / 255 - [0.48, 0.46, 0.41]) / [0.27, 0.26, 0.28]
    expected = image_tower(weights, torch.from_numpy(values).float().permute(2, 0, 1)[None])
    expected = torch.nn.functional.normalize(expected, dim=-1).numpy()
    assert np.abs(ranker.embed_images([image]) - expected).max() < 1e-5
    for text, ids in (("where is the liver ?", [2, 8, 9, 7, 5, 10, 3]), ("lung " * 3000, [2] + [6] * 10 + [3])):
        expected = torch.nn.functional.normalize(text_tower(weights, torch.tensor(ids)), dim=-1).numpy()
        assert np.abs(ranker.embed_texts([text, "liver"])[0] - expected).max() < 1e-5


def test_the_side_of_an_image_counts_and_none_is_no_image(folder):
    ranker = BiomedClipRanker(folder, device="cpu")
    plain = np.full((20, 90, 3), 99, np.uint8)
    marked = plain.copy()
    marked[:, :12] = 250
    first, second = ranker.embed_images([Image.fromarray(plain), Image.fromarray(marked)])
    assert np.abs(first - second).max() > 1e-3
    assert ranker.embed_images([]).shape == ranker.embed_texts([]).shape == (0, EMBED)


def test_the_original_file_reads_like_the_safetensors(folder, tmp_path):
    old = checkpoint() | {"text.transformer.embeddings.position_ids": torch.arange(CONTEXT)[None]}
    ranker = make_ranker(save(tmp_path, old, pickled=True), "cpu")
    assert isinstance(ranker, BiomedClipRanker)
    texts = ["the liver", "lung"]
    expected = BiomedClipRanker(folder, device="cpu").embed_texts(texts)
    assert np.array_equal(ranker.embed_texts(texts), expected)
    assert np.array_equal(copy.copy(ranker).embed_texts(texts), expected)
    assert ranker.settings() != BiomedClipRanker(folder, device="cpu").settings()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.trunk.norm.bias": None}, "1 weights are missing: vision.layernorm.bias"),
        ({"text.proj.0.weight": None}, "weight 'text_projection.0.weight' is missing"),
        ({"visual.trunk.extra": torch.zeros(1)}, "1 weights are unknown: visual.trunk.extra"),
        ({"visual.trunk.norm.bias": torch.zeros(3)}, "expected the weights of BiomedCLIP.*size mismatch"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(change, message, tmp_path):
    weights = {name: value for name, value in (checkpoint() | change).items() if value is not None}
    with pytest.raises(ModelError, match=f"(?s){message}"):
        BiomedClipRanker(save(tmp_path, weights), device="cpu")


def test_files_that_lack_or_run_code_are_refused(tmp_path):
    save(tmp_path, checkpoint(), pickled=True)
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(print))
    with pytest.raises(ModelError, match=r"expected BiomedCLIP's open_clip_model\.safetensors or"):
        BiomedClipRanker(tmp_path)
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {}}')
    with pytest.raises(ModelError, match=r"open_clip_config\.json: .*'vision_cfg'"):
        BiomedClipRanker(tmp_path)
