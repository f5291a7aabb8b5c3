"""Every method but OPERA for a LLaVA, one prompt at a time and greedily: each step reads everything again."""

from collections.abc import Callable
from contextlib import contextmanager
from math import exp, log
from typing import Any

import torch
from torch import Tensor

from a3tune.attention.capture import use_capture
from a3tune.decoding.avisc import Avisc
from a3tune.decoding.controlmllm import ControlMllm
from a3tune.decoding.damro import Damro
from a3tune.decoding.dola import Dola
from a3tune.decoding.m3id import M3id
from a3tune.decoding.pai import Pai
from a3tune.decoding.plain import Greedy
from a3tune.decoding.strategy import end_tokens
from a3tune.decoding.vcd import Vcd
from a3tune.vlm.encode import Example
from a3tune.vlm.load import Vlm
from ports.boosted import PLACE


class Port:
    """One prompt with one image."""

    def __init__(self, vlm: Vlm, asked: Example, region_N: Tensor) -> None:
        """`region_N` is what ControlMLLM is told."""
        self.vlm, self.region_N = vlm, region_N
        self.ids = asked.input_ids.tolist()
        self.image = int(vlm.model.config.image_token_id)
        self.pixels = asked.images["pixel_values"].to(next(vlm.model.parameters()).dtype)
        self.features_ND = self.features(self.pixels)

    def features(self, pixels: Tensor) -> Tensor:
        """The image's tokens, as the projector gives them."""
        model: Any = self.vlm.model.model
        with torch.no_grad():
            states = model.vision_tower(pixels, output_hidden_states=True).hidden_states
            return model.multi_modal_projector(states[self.vlm.model.config.vision_feature_layer][:, 1:])[0]

    def read(self, ids: list[int], features_ND: Tensor, **options: Any) -> Any:
        """One pass over everything."""
        model: Any = self.vlm.model.model
        embeds = model.get_input_embeddings()(torch.tensor([ids]))[0]
        places = torch.tensor(ids) == self.image
        embeds = embeds.masked_scatter(places[:, None], features_ND.to(embeds)) if places.any() else embeds
        return model.language_model(inputs_embeds=embeds[None], use_cache=False, **options)

    def logits(self, ids: list[int], features_ND: Tensor) -> Tensor:
        with torch.no_grad():
            return self.head(self.read(ids, features_ND).last_hidden_state[0, -1])

    def head(self, state: Tensor) -> Tensor:
        """Logits without those of tokens that no answer may hold."""
        head: Any = self.vlm.model.get_output_embeddings()
        return head(state).index_fill(-1, torch.tensor([self.image]), -1e4)

    def answer(self, longest: int, scores: Callable[[list[int], int], Tensor]) -> list[int]:
        """`scores(answer so far, step from 1)`."""
        answer: list[int] = []
        while len(answer) < longest and not (answer and answer[-1] in end_tokens(self.vlm)):
            answer.append(int(scores(answer, len(answer) + 1).argmax()))
        return answer


def contrasted(positive: Tensor, negative: Tensor, alpha: float, beta: float) -> Tensor:
    return cut((1 + alpha) * positive - alpha * negative, positive, beta)


def cut(scores: Tensor, positive: Tensor, beta: float) -> Tensor:
    return scores.masked_fill(positive < positive.max() + log(beta), -torch.inf)


def greedy(port: Port, method: Greedy, longest: int) -> list[int]:
    return port.answer(longest, lambda answer, step: port.logits(port.ids + answer, port.features_ND))


def vcd(port: Port, method: Vcd, longest: int) -> list[int]:
    betas = [1e-5 + (0.5e-2 - 1e-5) / (1 + exp(6 - 12 * t / 999)) for t in range(method.noise_step + 1)]
    kept = 1.0
    for beta in betas:
        kept *= 1 - beta
    noise = torch.randn(port.pixels.shape, generator=torch.Generator().manual_seed(0)).to(port.pixels)
    noisy_ND = port.features(kept**0.5 * port.pixels + (1 - kept) ** 0.5 * noise)

    def scores(answer: list[int], step: int) -> Tensor:
        ids = port.ids + answer
        return contrasted(port.logits(ids, port.features_ND), port.logits(ids, noisy_ND), method.alpha, method.beta)

    return port.answer(longest, scores)


def m3id(port: Port, method: M3id, longest: int) -> list[int]:
    text = [token for token in port.ids if token != port.image]

    def scores(answer: list[int], step: int) -> Tensor:
        lc = port.logits(port.ids + answer, port.features_ND).log_softmax(-1)
        lu = port.logits(text + answer, port.features_ND).log_softmax(-1)
        gamma = exp(-method.decay * step)
        added = (1 - gamma) / gamma * (lc - lu)
        if method.variant == "original":
            return lc + added if lc.max() < log(method.confidence) else lc
        return cut(lc + added, lc, method.beta)

    return port.answer(longest, scores)


def dola(port: Port, method: Dola, longest: int) -> list[int]:
    def scores(answer: list[int], step: int) -> Tensor:
        with torch.no_grad():
            states = port.read(port.ids + answer, port.features_ND, output_hidden_states=True).hidden_states
            p = port.logits(port.ids + answer, port.features_ND).softmax(-1)
            early = [port.head(states[layer][0, -1]) for layer in method.candidates(port.vlm)]
        distances = []
        for logits in early:
            q = logits.softmax(-1)
            m = (p + q) / 2
            parts = (
                (m * (m / p).log(), m * (m / q).log())
                if method.variant == "code"
                else (p * (p / m).log(), q * (q / m).log())
            )
            distances.append(sum(float(part.nan_to_num(0, 0, 0).mean()) for part in parts) / 2)
        chosen = early[max(range(len(early)), key=distances.__getitem__)]
        return cut(p.log() - chosen.log_softmax(-1), p.log(), method.beta)

    return port.answer(longest, scores)


def avisc(port: Port, method: Avisc, longest: int) -> list[int]:
    places = torch.tensor(port.ids) == port.image
    with eager(port.vlm), torch.no_grad():
        attentions = port.read(port.ids, port.features_ND, output_attentions=True).attentions
    rows = [layer[0].mean(0)[-1, places] for layer in attentions]
    portions = torch.stack([row.sum() for row in rows])
    portions = portions / portions.sum()
    count = int((portions.sort(descending=True).values.cumsum(0) < method.layer_share).sum()) + 1
    mean_N = torch.stack([rows[layer] for layer in portions.topk(count).indices]).mean(0)
    if method.selector == "topk":
        blind = torch.zeros_like(mean_N, dtype=torch.bool).index_fill(0, mean_N.topk(method.tokens).indices, True)
    else:
        blind = mean_N >= mean_N.mean() + mean_N.std()
    blind_ND = port.features_ND * blind[:, None]

    def scores(answer: list[int], step: int) -> Tensor:
        ids = port.ids + answer
        return contrasted(port.logits(ids, port.features_ND), port.logits(ids, blind_ND), method.alpha, method.beta)

    return port.answer(longest, scores)


def damro(port: Port, method: Damro, longest: int) -> list[int]:
    tower: Any = port.vlm.model.model.vision_tower
    with torch.no_grad():
        states = tower(port.pixels, output_hidden_states=True).hidden_states
    feature = port.vlm.model.config.vision_feature_layer
    layer = len(states) - 2 if method.variant == "medheval" else (feature if feature > 0 else len(states) + feature) - 1
    block = tower.encoder.layers[layer]
    entered = block.layer_norm1(states[layer])[0]
    query, key = block.self_attn.q_proj(entered), block.self_attn.k_proj(entered)
    heads = 1 if method.variant == "official" else block.self_attn.num_heads
    width = query.shape[-1] // heads
    looks = [
        (query[0, h * width : (h + 1) * width] @ key[:, h * width : (h + 1) * width].T / width**0.5).softmax(-1)
        for h in range(heads)
    ]
    best = torch.stack(looks).mean(0)[1:].topk(method.tokens).indices
    if method.variant == "official":
        first = port.ids.index(port.image)
        text = [token for token in port.ids if token != port.image]
        ids, features_ND = text[:first] + [port.image] * method.tokens + text[first:], port.features_ND[best]
    else:
        kept = torch.zeros(len(port.features_ND), 1).index_fill(0, best, 1)
        ids, features_ND = port.ids, port.features_ND * kept.to(port.features_ND)

    def scores(answer: list[int], step: int) -> Tensor:
        positive = port.logits(port.ids + answer, port.features_ND)
        return contrasted(positive, port.logits(ids + answer, features_ND), method.alpha, method.beta)

    return port.answer(longest, scores)


def pai(port: Port, method: Pai, longest: int) -> list[int]:
    text = [token for token in port.ids if token != port.image]
    first = len(port.ids) - (method.variant == "paper")
    layers = range(method.start_layer, method.end_layer)
    places = (torch.tensor(port.ids) == port.image).nonzero().flatten()

    def scores(answer: list[int], step: int) -> Tensor:
        PLACE.update({"layers": layers, "strength": method.boost, "image": places, "from": first})
        with attention_of(port.vlm, "boosted_eager"):
            lc = port.logits(port.ids + answer, port.features_ND).log_softmax(-1)
            PLACE.clear()
            lu = port.logits(text + answer, port.features_ND).log_softmax(-1)
        return cut(method.gamma * (lc - lu) + lu, lc, method.beta)

    return port.answer(longest, scores)


def controlmllm(port: Port, method: ControlMllm, longest: int) -> list[int]:
    places = torch.tensor(port.ids) == port.image
    after = torch.arange(len(places)) > places.nonzero().max()
    base = port.features_ND
    prompt = torch.zeros_like(base, requires_grad=True)
    history = prompt
    for _ in range(method.steps):
        current = method.beta * prompt + (1 - method.beta) * history
        with eager(port.vlm):
            attentions = port.read(port.ids, base + current, output_attentions=True).attentions
        looks_N = torch.stack([layer[0].mean(0)[after][:, places].mean(0) for layer in attentions]).mean(0)
        loss = method.alpha * (1 - (looks_N * port.region_N).sum() / looks_N.sum()) ** 2
        (gradient,) = torch.autograd.grad(loss, [prompt])
        base = (base + current).detach() if method.accumulate else base
        history = current.detach()
        prompt = (prompt - method.learning_rate * gradient).detach().requires_grad_()
    tuned = (base + method.beta * prompt + (1 - method.beta) * history).detach()
    return port.answer(longest, lambda answer, step: port.logits(port.ids + answer, tuned))


PORTS: dict[str, Callable[[Port, Any, int], list[int]]] = {
    "greedy": greedy,
    "vcd": vcd,
    "dola": dola,
    "avisc": avisc,
    "m3id": m3id,
    "damro": damro,
    "pai": pai,
    "controlmllm": controlmllm,
}


@contextmanager
def attention_of(vlm: Vlm, name: str) -> Any:
    """The language model with another attention function."""
    vlm.model.set_attn_implementation({"text_config": name})
    try:
        yield
    finally:
        use_capture(vlm.model)


def eager(vlm: Vlm) -> Any:
    return attention_of(vlm, "eager")
