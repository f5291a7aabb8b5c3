"""Where the model looked when it chose each word: one picture per token of the answer, side by side.

python examples/attention_of_each_word.py --quick --out out
python examples/attention_of_each_word.py --adapter runs/mine/adapter --image scan.png "Is there a lesion in the liver?"
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from a3tune.app.model import Answer, Asker
from a3tune.commands.subject import load_models
from a3tune.config import EvaluationConfig, ModelConfig
from a3tune.data.images import load_image
from a3tune.data.phantom import make_scan
from a3tune.vlm.heat import overlay
from a3tune.vlm.patches import paint

QUESTION = "Which part of the body does this image belong to?"


def main(out: Path, quick: bool, adapter: Path | None, image: Path | None, question: str) -> None:
    picture = Image.fromarray(make_scan(0).image).convert("RGB") if image is None else load_image(image)
    models = load_models(ModelConfig(), {"mine": adapter})
    asker = Asker(models, EvaluationConfig(max_new_tokens=4 if quick else 16))
    *_, answer = asker.ask("mine", "greedy", picture, question)
    assert isinstance(answer, Answer)
    print(answer.text)

    pixels = np.asarray(picture)
    size = (picture.height, picture.width)
    strip = Image.new("RGB", (picture.width * max(1, len(answer.tokens)), picture.height))
    for number, token in enumerate(answer.tokens):
        values = answer.attention("selected", row=number + 1)  # row 0 is the whole answer
        strip.paste(overlay(pixels, paint(values, answer.boxes, size)), (number * picture.width, 0))
        x0, y0, x1, y1 = answer.boxes[values.argmax()]
        print(f"{token!r:16} most at x {x0:.0f} to {x1:.0f}, y {y0:.0f} to {y1:.0f}: {values.max() / values.sum():.0%}")
    out.mkdir(parents=True, exist_ok=True)
    strip.save(out / "words.png")
    print(out / "words.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--adapter", type=Path, help="folder of an adapter; without it the base model answers")
    parser.add_argument("--image", type=Path, help="any image; without it a synthetic scan")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for words.png")
    parser.add_argument("--quick", action="store_true", help="four tokens at most")
    arguments = parser.parse_args()
    main(arguments.out, arguments.quick, arguments.adapter, arguments.image, arguments.question)
