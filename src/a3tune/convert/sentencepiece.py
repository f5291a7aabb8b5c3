"""`tokenizer.model`, the BPE vocabulary of LLaMA and Mistral checkpoints, without the sentencepiece package.

Knows the few fields of its protobuf message that a tokenizer needs; knows no model.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from a3tune.errors import ModelError

BPE = 2
"""`TrainerSpec.model_type` of a byte-pair vocabulary."""
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""`SentencePiece.type` of the pieces that stand for no ordinary text."""
_LONGEST_NUMBER, _LONGEST_PIECE = 63, 1000
"""Bits and bytes; what is longer is no vocabulary, and would be read for a time that grows with its square."""


class Piece(NamedTuple):
    text: str
    score: float
    type: int


def read_sentencepiece(path: Path) -> Tokenizer:
    """The same tokens as sentencepiece gives: a space before each text, bytes for what the vocabulary lacks.

    As in the slow tokenizers that the checkpoints were trained with, every stretch between two special tokens is a text
    of its own. Raises `ModelError` for another file, or another kind of vocabulary.
    """
    try:
        pieces, model_type = _parse(path.read_bytes())
    except (LookupError, struct.error, TypeError, AttributeError, ValueError) as error:
        raise ModelError(f"{path}: expected a sentencepiece model, got something else. Download it again.") from error
    if model_type != BPE or not pieces:
        raise ModelError(f"{path}: expected a BPE vocabulary (model type {BPE}), got type {model_type}.")
    ids = {piece.text: index for index, piece in enumerate(pieces)}
    unknown = next((piece.text for piece in pieces if piece.type == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=_merges(pieces, ids), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    special = [piece.text for piece in pieces if piece.type in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    defined = [piece.text for piece in pieces if piece.type == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in defined])
    return tokenizer


def _merges(pieces: list[Piece], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others; better scores first, as sentencepiece merges."""
    merges = []
    for index, piece in enumerate(pieces):
        halves = ((piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text)))
        merges += [(-piece.score, index, ids[a], ids[b], a, b) for a, b in halves if a in ids and b in ids]
    return [(a, b) for *_, a, b in sorted(merges)]


def _parse(message: bytes) -> tuple[list[Piece], int]:
    pieces, model_type = [], 1
    for field, value in _fields(message):
        if field == 1:
            parts = dict(_fields(value))
            score = struct.unpack("<f", parts.get(2, b"\0\0\0\0"))[0]
            pieces.append(Piece(parts[1].decode(), score, parts.get(3, 1)))
            if len(parts[1]) > _LONGEST_PIECE:
                raise ValueError("a piece as long as no vocabulary has one")
        elif field == 2:
            model_type = dict(_fields(value)).get(3, 1)
    return pieces, model_type


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: an integer, or the bytes of anything else."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
        elif wire in (1, 2, 5):
            size, at = _varint(message, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            value, at = message[at : at + size], at + size
            if at > len(message):
                raise IndexError("message ends within a field")
        else:
            raise ValueError(f"wire type {wire}")
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > _LONGEST_NUMBER:
            raise ValueError("a number of more than 64 bits")
