"""BERTScore (Zhang et al., 2020): how well the tokens of two reports match in the space of roberta-large.

Written here because bert-score fails on transformers 5 and on empty texts, while torchmetrics keeps start and end
tokens from being matched, which gives other numbers than bert-score, the one that papers report.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel

from a3tune.errors import ModelError
from a3tune.metrics.folders import MAX_TOKENS, read_config, required
from a3tune.metrics.text import Scores, Texts
from a3tune.models import choose_device, load_model

LAYER = 17
"""Hidden layer that bert-score takes of roberta-large."""
_BATCH = 16
_HOW = (
    "where there is a network, run `hf download FacebookAI/roberta-large --local-dir FOLDER`, then give it as bertscore"
)


def bert_score(predictions: Texts, references: Texts, folder: Path | None = None) -> Scores:
    """F1 of greedily matched tokens, not rescaled, without idf: `bertscore`, in [-1, 1]; 0 if a side is empty.

    Args:
        folder: roberta-large: `config.json`, `model.safetensors` and its tokenizer.

    Raises:
        ModelError: the folder does not hold that.
    """
    encoder = _Encoder(required(folder, ["config.json", "model.safetensors"], _HOW))
    scores: list[float] = []
    for start in range(0, len(predictions), _BATCH):
        batch = slice(start, start + _BATCH)
        scores += greedy_f1(*encoder(predictions[batch]), *encoder(references[batch])).tolist()
    return {"bertscore": scores}


def greedy_f1(said_BSD: Tensor, said_BS: Tensor, truth_BTD: Tensor, truth_BT: Tensor) -> Tensor:
    """F1 `[B]` of matching each token to the nearest of the other side.

    Args:
        said_BSD, truth_BTD: embeddings of length 1.
        said_BS, truth_BT: 2 for tokens of the text; 1 for start and end, which only others match; 0 for padding.
    """
    similarity_BST = said_BSD @ truth_BTD.mT
    nearest_BS = similarity_BST.masked_fill(truth_BT[:, None] == 0, -torch.inf).amax(2)
    nearest_BT = similarity_BST.masked_fill(said_BS[:, :, None] == 0, -torch.inf).amax(1)
    precision_B, recall_B = (
        (nearest * (role == 2)).sum(1) / (role == 2).sum(1)
        for nearest, role in ((nearest_BS, said_BS), (nearest_BT, truth_BT))
    )
    return (2 * precision_B * recall_B / (precision_B + recall_B)).nan_to_num(nan=0.0)


class _Encoder:
    def __init__(self, folder: Path) -> None:
        config, self._tokenizer = read_config(folder)
        if config.num_hidden_layers < LAYER:
            raise ModelError(f"{folder}: expected at least {LAYER} layers, got {config.num_hidden_layers}; {_HOW}")
        # RoBERTa counts positions from the one after its padding token.
        self._limit = min(MAX_TOKENS, config.max_position_embeddings - config.pad_token_id - 1)
        self._device = choose_device(None)
        self._model = load_model(AutoModel, folder, add_pooling_layer=False).to(self._device)
        del self._model.encoder.layer[LAYER:]

    @torch.no_grad()
    def __call__(self, texts: Texts) -> tuple[Tensor, Tensor]:
        """Embeddings of length 1, float32 [B, T, D], and roles [B, T] as in `greedy_f1`."""
        stripped = [text.strip() for text in texts]
        # The space makes RoBERTa read the first word as it reads the others (bert-score's add_prefix_space).
        tokens = self._tokenizer(
            [f" {text}" if text else "" for text in stripped],
            padding=True,
            truncation=True,
            max_length=self._limit,
            return_tensors="pt",
        ).to(self._device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        edges = torch.tensor([self._tokenizer.cls_token_id, self._tokenizer.sep_token_id], device=ids.device)
        return torch.nn.functional.normalize(hidden, dim=-1), mask * (2 - torch.isin(ids, edges).long())
