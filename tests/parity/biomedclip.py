"""Compare the port of BiomedCLIP with open_clip: same random weights, same images and texts.

    python tests/parity/biomedclip.py

Needs open_clip_torch, timm and torchvision, so an environment of its own; nothing is downloaded. BiomedCLIP's
architecture is built at its published size with random weights and a small vocabulary of its own, saved in the
published layout, and read by the port. Prints the largest difference of the unit vectors; fails above 1e-5, or if
different inputs look alike.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from open_clip.transform import image_transform
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertTokenizer

from a3tune.labels.rank.biomedclip import BiomedClipRanker
from a3tune.labels.rank.embed import square

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "where", "is", "the", "liver", "lung", "?")
TEXTS = ("where is the liver ?", "lung", "liver lung the " * 1000)
TOLERANCE = 1e-5


def save(folder: Path) -> CustomTextCLIP:
    """BiomedCLIP's architecture with random weights, written as published."""
    BertConfig(vocab_size=len(WORDS), architectures=["BertModel"]).save_pretrained(folder / "bert")
    vision = {"timm_model_name": "vit_base_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 224}
    text = {
        "hf_model_name": str(folder / "bert"),
        "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "hf_model_pretrained": False,
        "context_length": 256,
    }
    torch.manual_seed(0)
    model = CustomTextCLIP(512, CLIPVisionCfg(**vision), CLIPTextCfg(**text)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # timm starts some at zero, where a wrong name would not show
            parameter += 0.05 * torch.randn_like(parameter)
    config = {
        "model_cfg": {"embed_dim": 512, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": MEAN, "std": STD},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    ids = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    BertTokenizer(tokenizer_object=tokenizer, vocab=ids).save_pretrained(folder)
    return model


@torch.inference_mode()
def main() -> int:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in ((300, 500), (90, 40))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save(folder)
        ranker = BiomedClipRanker(folder, device="cpu")
        transform = image_transform(
            224, is_train=False, mean=MEAN, std=STD, resize_mode="shortest", interpolation="bicubic"
        )
        pixels = torch.stack([transform(square(image)) for image in images])
        tokenizer = BertTokenizer.from_pretrained(folder)
        tokens = tokenizer(list(TEXTS), padding="max_length", truncation=True, max_length=256, return_tensors="pt")
        theirs = {
            "image": model.encode_image(pixels, normalize=True),
            "text": model.encode_text(tokens.input_ids, normalize=True),
        }
        ours = {"image": ranker.embed_images(images), "text": ranker.embed_texts(TEXTS)}
    worst = {name: float(np.abs(ours[name] - theirs[name].numpy()).max()) for name in ours}
    apart = {name: float(np.abs(vectors[0] - vectors[1]).max()) for name, vectors in ours.items()}
    for name, value in worst.items():
        print(f"{name}: largest difference {value:.1e} (two inputs differ by {apart[name]:.1e})")
    return int(max(worst.values()) > TOLERANCE or min(apart.values()) < 100 * TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
