"""CheXbert similarity (Smit et al., 2020; Yu et al., 2023): cosine between two reports as CheXbert's encoder sees them.

The labels that CheXbert was trained for play no part in it.
"""

import pickle
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel

from a3tune.errors import ModelError
from a3tune.metrics.folders import MAX_TOKENS, read_config, required
from a3tune.metrics.text import Scores, Texts
from a3tune.models import check_complete, choose_device, read_pickled

_WEIGHTS = "chexbert.pth"
_BATCH = 16
_HOW = (
    "where there is a network, run `hf download google-bert/bert-base-uncased --local-dir FOLDER config.json vocab.txt "
    "tokenizer.json tokenizer_config.json` and `hf download StanfordAIMI/RRG_scorers chexbert.pth --local-dir FOLDER`, "
    "then give it as chexbert"
)


def chexbert(predictions: Texts, references: Texts, folder: Path | None = None) -> Scores:
    """Cosine of the two [CLS] embeddings: `chexbert`, in [-1, 1]. Only the first 512 tokens count.

    Args:
        folder: `config.json` and tokenizer of bert-base-uncased, and `chexbert.pth`.

    Raises:
        ModelError: the folder does not hold that.
    """
    folder = required(folder, ["config.json", _WEIGHTS], _HOW)
    config, tokenizer = read_config(folder)
    model = AutoModel.from_config(config, add_pooling_layer=False)
    try:
        keys = model.load_state_dict(_read(folder / _WEIGHTS), strict=False)
    except RuntimeError as error:  # shapes that do not fit
        last = str(error).splitlines()[-1].strip()
        raise ModelError(f"{folder / _WEIGHTS}: expected the weights of CheXbert: {last}; {_HOW}") from error
    check_complete(folder / _WEIGHTS, model.state_dict(), keys.missing_keys, keys.unexpected_keys)
    model = model.to(device := choose_device(None)).eval()
    limit = min(MAX_TOKENS, config.max_position_embeddings)

    @torch.no_grad()
    def encode(texts: Texts) -> Tensor:
        """[CLS] embeddings [B, D]."""
        clean = [" ".join(text.split()) for text in texts]
        tokens = tokenizer(clean, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(device)
        return model(**tokens).last_hidden_state[:, 0]

    scores: list[float] = []
    for start in range(0, len(predictions), _BATCH):
        batch = slice(start, start + _BATCH)
        scores += torch.cosine_similarity(encode(predictions[batch]), encode(references[batch])).tolist()
    return {"chexbert": scores}


def _read(path: Path) -> dict[str, Tensor]:
    """The encoder's weights, without CheXbert's heads and the unused pooler."""
    try:
        weights = read_pickled(path)["model_state_dict"]
    except (RuntimeError, OSError, ValueError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ModelError(f"{path}: expected CheXbert's published checkpoint: {error}; {_HOW}") from error
    encoder = {name.removeprefix("module."): value for name, value in weights.items()}
    unused = ("pooler.", "embeddings.position_ids")
    return {
        inner: value
        for name, value in encoder.items()
        if name.startswith("bert.") and not (inner := name.removeprefix("bert.")).startswith(unused)
    }
