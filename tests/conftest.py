"""Models small enough for any test, saved as users have them: a random VLM and a random ranker in folders."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a process for each core; PyTorch reads it when it starts

import pytest
import torch
from hypothesis import settings
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from a3tune.data.phantom.questions import TEMPLATES
from a3tune.machine import remembered
from a3tune.vlm.tiny import IMAGE_SIZE, PATCH_SIZE, random_vlm, tiny_image_processor, tiny_processor, train_tokenizer

# Jobs in the background of a shell are started to ignore Ctrl-C, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes says nothing on a machine that does other work, too.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
TEXTS = [text for templates in TEMPLATES.values() for text in templates]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered of the tests' files does not go to the home of who runs them."""
    place = tmp_path_factory.mktemp("cache") / "hashes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remembered, "cache_file", lambda: place)
        yield


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "vlm"
    random_vlm(layers=2, heads=4, kv_heads=2, hidden=32).save_pretrained(folder)
    tiny_processor(train_tokenizer(TEXTS)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ranker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "ranker"
    tokenizer = train_tokenizer(TEXTS, vocab=400)
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (tokenizer.bos_token, tokenizer.eos_token)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=size | text, vision_config=size | vision, projection_dim=8))
    model.save_pretrained(folder)
    CLIPProcessor(tiny_image_processor(), tokenizer).save_pretrained(folder)
    return folder
