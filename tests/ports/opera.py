"""OPERA as a search that reads everything again for each candidate of each beam, on the eager model."""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from a3tune.adapters import Routing
from a3tune.compat.generation import ENCODED
from a3tune.decoding.branches import encode_images
from a3tune.decoding.opera import LARGEST_PENALTY, Opera
from a3tune.decoding.strategy import placeholders
from a3tune.vlm.encode import TOKEN_MASKS, Example, pad
from a3tune.vlm.load import Vlm


class Slow:
    """One sample and a number of beams; every pass reads everything on the eager model, without a cache."""

    def __init__(self, vlm: Vlm, asked: Example, beams: int) -> None:
        self.vlm, self.asked, self.beams = vlm, asked, beams
        self.read: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self.returns = 0
        self.images: dict[int, Any] = {}

    def look(self, answer: list[int]) -> tuple[Tensor, Tensor]:
        """Logits after the answer `[V]`, and what its tokens attend to in the last layer: largest head, sum 1."""
        self.look_at([answer])
        return self.read[tuple(answer)]

    def look_at(self, answers: list[list[int]]) -> None:
        """Reads answers of one length, those that were not read before, in one pass."""
        new = [answer for answer in dict.fromkeys(map(tuple, answers)) if answer not in self.read]
        if not new:
            return
        ids = [torch.cat([self.asked.input_ids, torch.tensor(answer, dtype=torch.long)]) for answer in new]
        inputs: dict[str, Any] = dict(pad(self.vlm, [replace(self.asked, input_ids=row) for row in ids], "right"))
        masks = {name: inputs.pop(name) for name in TOKEN_MASKS}
        inputs.pop("labels", None)
        if len(new) not in self.images:
            self.images[len(new)] = encode_images(self.vlm, inputs)[ENCODED]
        inputs = {name: value for name, value in inputs.items() if name != "pixel_values"}
        routing = {"routing": Routing(masks["prompt_mask"], masks["image_mask"])}
        forward = routing if hasattr(self.vlm.model, "peft_config") else {}
        with torch.no_grad():
            out = self.vlm.model(
                **inputs, **forward, **{ENCODED: self.images[len(new)]}, use_cache=False, output_attentions=True
            )
        rows = out.attentions[-1][:, :, len(self.asked.input_ids) :].amax(1)
        for answer, logits, attention in zip(new, out.logits[:, -1].float(), rows, strict=True):
            self.read[answer] = logits, attention / attention.sum(-1, keepdim=True)

    def offers(self, opera: Opera, answers: list[list[int]]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Of each answer, what `offer` says."""
        self.look_at(answers)
        self.look_at([[*answer, token] for answer in answers for token in self.likely(answer, opera.candidates)])
        rows, places = zip(*(self.offer(opera, answer) for answer in answers), strict=True)
        return rows, places

    def allowed(self, answer: list[int]) -> Tensor:
        """Logits after the answer, without the tokens that no answer may hold."""
        return self.look(answer)[0].index_fill(0, torch.tensor(placeholders(self.vlm)), -torch.inf)

    def likely(self, answer: list[int], count: int) -> list[int]:
        return self.allowed(answer).topk(count).indices.tolist()

    def offer(self, opera: Opera, answer: list[int]) -> tuple[Tensor, int]:
        """Scores of the next token, and the place in the answer that most candidates lean on."""
        start, image = len(self.asked.input_ids), self.asked.input_ids == self.vlm.model.config.image_token_id
        logits, places = self.allowed(answer), []
        scores = torch.full_like(logits, -999.0)
        for token in self.likely(answer, opera.candidates):
            attention = self.look([*answer, token])[1]
            scaled = opera.scale * attention[:, start:].double()
            columns = 1e-7 * torch.stack([scaled[j:, j].prod() for j in range(len(scaled))])
            columns = (columns.half() if opera.variant == "code" else columns)[-opera.window :]
            places.append(int(columns.float().argmax()) + len(scaled) - len(columns))
            trust = -attention[-1, :start][image].sum() if len(scaled) <= opera.initial_tokens else columns.max()
            scores[token] = logits[token] - (opera.penalty * trust).clamp(max=LARGEST_PENALTY[opera.variant])
        return scores, mode(places)

    def search_as_published(self, opera: Opera, ends: list[int], longest: int) -> list[int]:
        """The best answer by the published loop and the beam scorer of transformers 4.29, which it was made for."""
        image = self.asked.input_ids == self.vlm.model.config.image_token_id
        prompt = len(image) - int((image[1:] & image[:-1]).sum())
        beams: list[tuple[float, list[int]]] = [(0.0, []), *[(-1e9, [])] * (self.beams - 1)]
        heap: list[tuple[float, list[int]]] = []
        history, leant, chosen, rejected, tries = [], [], {}, {}, Counter()
        while True:
            step = len(beams[0][1])
            history.append((beams, list(heap)))
            rows, places = self.offers(opera, [answer for _, answer in beams])
            leant.append(places)
            place = mode(list(places))
            if place >= opera.initial_tokens and all(
                sum(past[beam] == place for past in leant) > opera.threshold for beam in range(self.beams)
            ):
                back = next((at for at in (place + 1, place) if tries[at] < opera.candidates), None)
                if back is not None and back < step:
                    self.returns += 1
                    tries[back] += 1
                    history, leant, step = history[: back + 1], leant[: back + 1], back
                    beams, heap = history[back]  # the very list: a later return finds in it what is added from here on
                    rejected.pop(back + 1, None)
                    rejected[back] = rejected.get(back, []) + chosen[back]
                    rows = [self.allowed(answer) for _, answer in beams]
                    for beam, token in rejected[back]:
                        rows[beam][token] = self.allowed(beams[beam][1]).masked_fill(rows[beam].isneginf(), 1e9).min()
            total = torch.stack([row.log_softmax(-1) + score for (score, _), row in zip(beams, rows, strict=True)])
            score, at = first(total, (1 + len(ends)) * self.beams)
            going = []
            for rank, (value, place) in enumerate(zip(score.tolist(), at.tolist(), strict=True)):
                beam, token = divmod(place, total.shape[1])
                if token not in ends:
                    going.append((value, beam, token))
                elif rank < self.beams:
                    self.add(heap, value / (prompt + step), [*beams[beam][1], token])
                if len(going) == self.beams:
                    break
            chosen[step] = [(beam, token) for _, beam, token in going]
            beams = [(value, [*beams[beam][1], token]) for value, beam, token in going]
            done = len(heap) == self.beams and heap[-1][0] >= float(score[0]) / (prompt + step + 1)
            if done or step + 1 == longest:
                for value, answer in () if done else beams:
                    self.add(heap, value / (prompt + step + 1), answer)
                return heap[0][1]

    def add(self, heap: list[tuple[float, list[int]]], score: float, answer: list[int]) -> None:
        heap.append((score, answer))
        heap.sort(key=lambda one: -one[0])
        del heap[self.beams :]

    def search(self, opera: Opera, ends: list[int], longest: int) -> list[int]:
        """The best answer. A beam is (score, answer)."""
        beams: list[tuple[float, list[int]]] = [(0.0, []), *[(-1e9, [])] * (self.beams - 1)]
        ended: list[tuple[float, list[int]]] = []
        states, leant, chosen = [], [], []
        tries, forbidden = Counter(), {}
        while True:
            step = len(beams[0][1])
            states.append((beams, ended))
            rows, places = self.offers(opera, [answer for _, answer in beams])
            leant.append(places)
            place = mode(list(places))
            often = all(sum(past[beam] == place for past in leant) > opera.threshold for beam in range(self.beams))
            back = next((at for at in (place + 1, place) if tries[at] < opera.candidates), step)
            if place >= opera.initial_tokens and back < step and often:
                self.returns += 1
                tries[back] += 1
                forbidden = {at: pairs for at, pairs in forbidden.items() if at <= back}
                forbidden[back] = forbidden.get(back, []) + chosen[back]
                states, leant, chosen, step = states[: back + 1], leant[: back + 1], chosen[:back], back
                beams, ended = states[back]
                rows = [self.allowed(answer) for _, answer in beams]
                for beam, token in forbidden[back]:
                    rows[beam][token] = -torch.inf
            total = torch.stack([row.log_softmax(-1) + score for (score, _), row in zip(beams, rows, strict=True)])
            best = first(total, (1 + len(ends)) * self.beams)
            offers = [(float(score), *divmod(int(at), total.shape[1])) for score, at in zip(*best, strict=True)]
            over = [token in ends or step + 1 == longest for _, _, token in offers]
            for (score, beam, token), end in list(zip(offers, over, strict=True))[: self.beams]:
                ended = [*ended, (score / (step + 1), [*beams[beam][1], token])] if end else ended
            ended = sorted(ended, key=lambda one: -one[0])[: self.beams]
            going = [offer for offer, end in zip(offers, over, strict=True) if not end][: self.beams]
            if not going or (len(ended) == self.beams and going[0][0] / (step + 1) <= ended[-1][0]):
                return ended[0][1]
            chosen.append([(beam, token) for _, beam, token in going])
            beams = [(score, [*beams[beam][1], token]) for score, beam, token in going]


def mode(values: list[int]) -> int:
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def first(total: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best scores and their places; of equal ones the first, where published code takes any."""
    score, at = total.flatten().sort(descending=True, stable=True)
    return score[:count], at[:count]
