"""How the next token is chosen from its scores: greedy, beams, and ways to sample (the paper's Appendix B).

Knows nothing of where the scores come from.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from a3tune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from a3tune.vlm.load import Vlm


@dataclass(frozen=True, slots=True)
class Strategy:
    """How one token is chosen; the defaults are greedy decoding."""

    do_sample: bool = False
    num_beams: int = 1
    temperature: float = 1.0
    top_k: int = 50
    """Most likely tokens to sample from; 0 is all. Only sampling looks at it."""
    top_p: float = 1.0
    """Share of the probability to sample from, most likely tokens first."""

    def config(self, vlm: "Vlm", max_new_tokens: int) -> "GenerationConfig":
        """All settings are stated: those that are not come from the checkpoint's `generation_config.json`."""
        from transformers import GenerationConfig

        return GenerationConfig(
            **asdict(self),
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            length_penalty=1.0,
            early_stopping=False,
            num_return_sequences=1,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            min_new_tokens=0,
            eos_token_id=end_tokens(vlm),
            pad_token_id=vlm.tokenizer.pad_token_id,
            suppress_tokens=placeholders(vlm),
        )


STRATEGIES: dict[str, Strategy] = {
    "greedy": Strategy(),
    "beam": Strategy(num_beams=5),
    "nucleus": Strategy(do_sample=True, top_k=0, top_p=0.9),
    "sampling": Strategy(do_sample=True, temperature=0.7),
    "multinomial": Strategy(do_sample=True, top_k=0),
}
"""By name, with the settings of the paper's Appendix B; "sampling" is its row without a method's name. "multinomial"
takes tokens as often as they are likely, as VCD, AVISC, M3ID and DAMRO do in published code, the paper's included."""


def make_strategy(strategy: str | Strategy) -> Strategy:
    """The strategy of that name, or the one given. Raises ConfigError for an unknown name."""
    if isinstance(strategy, Strategy):
        return strategy
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    return STRATEGIES[strategy]


def end_tokens(vlm: "Vlm") -> list[int]:
    """Ids that end an answer: the tokenizer's, the chat template's and those of the checkpoint; sorted."""
    from a3tune.vlm.encode import end_token_id

    ids = getattr(vlm.model.generation_config, "eos_token_id", None)
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return sorted({vlm.tokenizer.eos_token_id, end_token_id(vlm), *ids})


def placeholders(vlm: "Vlm") -> list[int]:
    """Ids that stand for an image or video, which no answer may hold: the model would look for its features."""
    names = ("image_token_id", "video_token_id")
    return [token for name in names if (token := getattr(vlm.model.config, name, None)) is not None]
