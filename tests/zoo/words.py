"""Tokenizers of the zoo: the tiny one's words with a family's control tokens."""

from transformers import PreTrainedTokenizerFast

from a3tune.data.phantom.questions import TEMPLATES
from a3tune.vlm.tiny import train_tokenizer


def tokenizer(*control: str, named: dict[str, str] | None = None, **special: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows `control` tokens and `special` ones (`eos_token="</s>"`, ...).

    `named` become attributes (`tokenizer.image_token`), as newer checkpoints have them.
    """
    words = train_tokenizer([text for templates in TEMPLATES.values() for text in templates], vocab=400)
    made = PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer, extra_special_tokens=named or {}, padding_side="left", **special
    )
    made.add_tokens(list(control), special_tokens=True)
    return made
