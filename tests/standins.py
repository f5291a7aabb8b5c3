"""What the documentation takes as downloaded, small: a data set and checkpoints in the layouts of their authors."""

import json
import shutil
from pathlib import Path

import torch
from transformers import SamConfig, SamModel

from checkpoints import huatuo, llava_med, llava_med_15

VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "output_channels": 16,
    "global_attn_indexes": [0],
    "mlp_dim": 16,
    "num_pos_feats": 8,
}
PROMPT = {"hidden_size": 16, "image_size": 32, "patch_size": 4, "mask_input_channels": 4}
DECODER = {
    "hidden_size": 16,
    "mlp_dim": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "iou_head_hidden_dim": 16,
}


def write_slake(folder: Path, picture: Path) -> None:
    """SLAKE's layout, every question about one picture."""
    for number, split in enumerate(("train", "validate", "test")):
        place = folder / "imgs" / f"xmlab{number}"
        place.mkdir(parents=True)
        shutil.copy(picture, place / "source.jpg")
        (place / "detection.json").write_text(json.dumps([{"Liver": [10, 10, 60, 50]}]))
        row = {"img_id": number, "img_name": f"xmlab{number}/source.jpg", "q_lang": "en", "base_type": "vqa"}
        row |= {"location": "Abdomen", "modality": "CT", "triple": ["vhead", "_", "_"]}
        asked = (
            {"qid": 2 * number, "question": "Where is the liver?", "answer": "Left", "answer_type": "OPEN"},
            {"qid": 2 * number + 1, "question": "Is the liver healthy?", "answer": "No", "answer_type": "CLOSED"},
        )
        rows = [row | question | {"content_type": "Position"} for question in asked]
        (folder / f"{split}.json").write_text(json.dumps(rows))
    (folder / "mask.txt").write_text("1: Liver\n")


def write_checkpoints(folder: Path) -> None:
    """LLaVA-Med 1.5, HuatuoGPT-Vision, and LLaVA-Med's delta with its base and tower."""
    llava_med_15(folder / "llava-med-v1.5-mistral-7b")
    huatuo(folder / "HuatuoGPT-Vision-7B")
    llava_med(folder / "llava-med-7b-delta", folder / "llama-7b", folder / "clip-vit-large-patch14")


def write_sam(folder: Path) -> None:
    parts = {"vision_config": VISION, "prompt_encoder_config": PROMPT, "mask_decoder_config": DECODER}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        SamModel(SamConfig(**parts)).save_pretrained(folder)
