"""Reports -> RaTEScore. Runs alone: standard input `[predictions, references]`, last line of output the scores."""

import json
import sys

import torch
from RaTEScore import RaTEScore  # pyright: ignore[reportMissingImports]
from RaTEScore.utils import sentence_split  # pyright: ignore[reportMissingImports]

NO_ENTITIES = 0.5
"""What the package gives when either side has no entities."""


def main() -> None:
    predictions, references = json.load(sys.stdin)
    scorer = RaTEScore(use_gpu=torch.cuda.is_available())
    scores = []
    for pair in zip(predictions, references):  # noqa: B905  (old Python versions)
        # The package skips a text without sentences and takes the next one's for it, so pairs go in one by one.
        whole = all(sentence_split([text])[0] for text in pair)
        scores.append(float(scorer.compute_score([pair[0]], [pair[1]])[0]) if whole else NO_ENTITIES)
    print()
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
