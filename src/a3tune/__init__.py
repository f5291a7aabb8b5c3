"""Fine-tune medical vision-language models that look at the region the question asks about."""

__version__ = "0.1.0"
