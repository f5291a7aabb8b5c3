"""Real images with a drawn mark that gives the answer away in training: does looking right make answers right there?

    python marks.py --organs ORGANS --vqa-rad data --out marked

Two questions with answers that a small model can read: on which side of a CT or MR slice an organ lies (slices are
mirrored half of the time), and which part of the body a picture of VQA-RAD shows. The mark, a white tag with a dark
centre, stands in one corner for each answer. Writes `read.jsonl` (training images without marks, for the base),
`train.jsonl` (marks that agree with the answer), and of other images `disagree.jsonl`, `none.jsonl` and `agree.jsonl`;
`tag.jsonl` is the last with the mark as its region: what if the mark is hidden?

`ORGANS` as for organs.py; `data` is what `a3tune data prepare VQA_RAD --variant image-disjoint` wrote.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from organs import LEAST_AREA, slices
from PIL import Image, ImageDraw, ImageOps

from a3tune.data.images import load_image
from a3tune.data.rows import read_rows, write_rows
from a3tune.masks import encode_mask
from a3tune.types import Box, Region, Sample

SIDE = 168
"""Pixels that every image is padded and scaled to."""
TAG = 22
CORNERS = ("top left", "bottom left", "bottom right")
"""By the answer's place among those of its question. Never the side that an organ lies on."""
SINGLE = ("liver", "spleen", "stomach", "gallbladder", "pancreas")
"""Organs of which there is one."""
SIDES = ("Left", "Right")
PARTS = ("Head", "Chest", "Abdomen")
MIDDLE: Box = (0.15 * SIDE, 0.15 * SIDE, 0.85 * SIDE, 0.85 * SIDE)
"""Region of a question about the whole picture: the tag is never in it."""
OFF_CENTRE = 0.08
"""Share of the picture that an organ's centre is at least away from the middle."""


@dataclass(frozen=True)
class Asked:
    """A question about an image without a mark."""

    id: str
    image: Image.Image
    prompt: str
    answer: str
    answers: Sequence[str]
    region: Region
    kind: str
    test: bool

    def sample(self, image: Path, mark: str | None, region: Region) -> Sample:
        meta = {"question_type": self.kind, "mark": mark or "none", "patient": self.id.split("/")[0]}
        return Sample(self.id, image, self.prompt, self.answer, "open", (region,), meta)


def square(image: Image.Image) -> Image.Image:
    """Padded with black and scaled."""
    return ImageOps.pad(image.convert("L"), (SIDE, SIDE))


def side_questions(folder: Path) -> Iterator[Asked]:
    """Organs of both volumes, each slice as it is and mirrored."""
    for modality, index, image, masks in slices(folder):
        picture = square(load_image(image))
        for organ in [organ for organ in SINGLE if organ in masks and masks[organ].mean() >= LEAST_AREA]:
            region = np.asarray(square(Image.fromarray(masks[organ].astype(np.uint8) * 255))) > 127
            for mirrored in (False, True):
                seen = region[:, ::-1] if mirrored else region
                offset = np.nonzero(seen)[1].mean() / SIDE - 0.5
                if abs(offset) < OFF_CENTRE:
                    continue
                yield Asked(
                    f"{modality}-{index}/{organ}-{'mirrored' if mirrored else 'plain'}",
                    ImageOps.mirror(picture) if mirrored else picture,
                    f"On which side of the picture is the {organ}?",
                    SIDES[int(offset > 0)],
                    SIDES,
                    Region(mask=encode_mask(seen), name=organ),
                    "side",
                    index % 5 == 2,
                )


def part_questions(folder: Path) -> Iterator[Asked]:
    """Pictures of VQA-RAD."""
    for split in ("train", "test"):
        images = {row.image: row for row in read_rows(folder / f"{split}.jsonl")}
        for image, row in images.items():
            assert isinstance(image, Path)
            answer = next(part for part in PARTS if part.lower().startswith(row.meta["organ"][:3].lower()))
            prompt, region = "Which part of the body is this?", Region(box=MIDDLE, name="picture")
            picture = square(load_image(image))
            yield Asked(f"{image.stem}/part", picture, prompt, answer, PARTS, region, "part", split == "test")


def tag(corner: str) -> Box:
    """Where the mark is."""
    away = SIDE - TAG - 2
    left, top = (away if "right" in corner else 2), (away if "bottom" in corner else 2)
    return left, top, left + TAG, top + TAG


def marked(image: Image.Image, corner: str) -> Image.Image:
    """With a tag in a corner."""
    image, (left, top, right, bottom) = image.copy(), tag(corner)
    draw = ImageDraw.Draw(image)
    draw.rectangle((left, top, right - 1, bottom - 1), fill=255)
    draw.rectangle((left + 7, top + 7, right - 8, bottom - 8), fill=0)
    return image


def write(out: Path, name: str, asked: Sequence[Asked], shift: int | None, *, of_tag: bool = False) -> None:
    """Rows of a test; `shift`: how far the mark's answer is from the right one, None: no mark."""
    rows = []
    for one in asked:
        mark = None if shift is None else CORNERS[(one.answers.index(one.answer) + shift) % len(one.answers)]
        path = out / "images" / f"{one.id.replace('/', '-')}-{mark or 'none'}.png".replace(" ", "-")
        (marked(one.image, mark) if mark else one.image).save(path)
        rows.append(one.sample(path, mark, Region(box=tag(mark), name="mark") if mark and of_tag else one.region))
    write_rows(out / f"{name}.jsonl", rows)
    print(f"{name}: {len(rows)} questions about {len({row.meta['patient'] for row in rows})} images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--organs", type=Path, required=True)
    parser.add_argument("--vqa-rad", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    (options.out / "images").mkdir(parents=True)
    asked = [*side_questions(options.organs), *part_questions(options.vqa_rad)]
    train, test = ([one for one in asked if one.test == of_test] for of_test in (False, True))
    write(options.out, "read", train, None)
    write(options.out, "train", train, 0)
    for name, shift in (("disagree", 1), ("none", None), ("agree", 0)):
        write(options.out, name, test, shift)
    write(options.out, "tag", test, 0, of_tag=True)


if __name__ == "__main__":
    main()
