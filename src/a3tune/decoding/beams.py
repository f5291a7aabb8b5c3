"""A beam search over one sample as a value: each state is made from the one before, so that a search can go back.

Knows scores and tokens; not where the scores come from.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

DEAD = -1e9
"""Score of a beam that does not exist (yet)."""


class MeanOfAnswer:
    """How beams that ended are scored, by transformers' rules of today: over the answer, its end token included."""

    def tokens(self, length: int, *, complete: bool) -> int:
        """What an answer's sum of log-probabilities is divided by; `complete` says whether its last token ends it."""
        return length

    def ended(self, complete: Tensor, rank: Tensor, *, full: bool) -> list[int]:
        """Which candidates, best first, are answers: those among the first B that end, or are as long as may be."""
        return [i for i in range(len(rank)) if full or complete[i]]

    def hope(self, score: Tensor, going: Tensor) -> Tensor:
        """The best score that can still be had, of all candidates `score` and those that go on."""
        return going[0]


class MeanWithPrompt(MeanOfAnswer):
    """By the rules of transformers 4.29, which OPERA's published numbers were made with."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def tokens(self, length: int, *, complete: bool) -> int:
        return self.prompt + length - complete

    def ended(self, complete: Tensor, rank: Tensor, *, full: bool) -> list[int]:
        first = [i for i in range(len(rank)) if complete[i]]
        return first + rank.tolist() if full else first

    def hope(self, score: Tensor, going: Tensor) -> Tensor:
        return score[0]


@dataclass(frozen=True, eq=False)
class Beams:
    """A state of the search; its rules are those of transformers with `early_stopping=False`."""

    tokens_BS: Tensor
    score_B: Tensor
    """Sum of the log-probabilities of each beam's tokens."""
    products_BS: Tensor
    """See `Opera.over_trust`."""
    parent_B: Tensor
    """The beam of the state before that each goes on from."""
    choice_B: Tensor
    """The latest tokens as places in the flattened scores `[B, V]` of the state before."""
    finished: tuple[tuple[float, Tensor], ...]
    """The best ended answers and their scores, best first; at most B."""
    done: bool

    @classmethod
    def start(cls, beams: int, device: torch.device) -> "Beams":
        score_B = torch.full((beams,), DEAD, device=device)
        score_B[0] = 0  # beams of equal tokens would all choose the same
        none = torch.zeros(0, dtype=torch.long, device=device)
        return cls(none.expand(beams, 0), score_B, score_B.new_zeros(beams, 0), none, none, (), done=False)

    def choose(self, logits_BV: Tensor, config: GenerationConfig, scoring: MeanOfAnswer) -> "Beams":
        """The state after one more token."""
        beams, vocab = logits_BV.shape
        ends: Any = config.eos_token_id
        total = (logits_BV.log_softmax(-1) + self.score_B[:, None]).flatten()
        score, choice = largest(total, min(max(2, 1 + len(ends)) * beams, len(total)))
        parent, token = choice // vocab, choice % vocab
        tokens = torch.cat([self.tokens_BS[parent], token[:, None]], dim=1)
        length = tokens.shape[1]
        complete = torch.isin(token, torch.tensor(ends, device=token.device))
        going, rank = largest(score + DEAD * complete, beams)
        full = length == config.max_new_tokens
        ended = scoring.ended(complete, rank, full=full)
        best = [(float(score[i]) / scoring.tokens(length, complete=bool(complete[i])), tokens[i]) for i in ended]
        finished = sorted([*self.finished, *best], key=lambda answer: -answer[0])[:beams]
        hope = float(scoring.hope(score, going)) / scoring.tokens(length, complete=False)
        return Beams(
            tokens[rank],
            going,
            self.products_BS[parent[rank]],
            parent[rank],
            choice[rank],
            tuple(finished),
            done=full or (len(finished) == beams and hope <= finished[-1][0]),
        )


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of a vector and their places, of equal ones the first.

    `topk` takes any of equal ones. All tokens that are no candidates of OPERA's are equal, and some steps must choose
    among them: with fewer candidates than beams, or when every candidate was penalised below them.
    """
    least = scores.topk(count).values[-1]
    places = (~(scores < least)).nonzero().flatten()  # with those that are no numbers
    found, order = scores[places].sort(descending=True, stable=True)
    return found[:count], places[order[:count]]
