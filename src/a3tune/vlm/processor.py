"""A checkpoint's processor, also where the packages for its videos are not installed.

Knows what transformers needs to load a processor; not what the processor does to an image.
"""

from typing import Any

from transformers import AutoProcessor, Idefics3Processor, PretrainedConfig, ProcessorMixin

from a3tune.compat.processing import is_num2words_available, is_torchvision_available, processor_class

IMAGE_ONLY: dict[str, type[ProcessorMixin]] = {"smolvlm": Idefics3Processor}
"""Families whose processor cannot even be made without video packages (SmolVLM counts frames in words, with
num2words), by `model_type`: the processor that writes the same tokens for images."""


def load_processor(source: str, config: PretrainedConfig) -> Any:
    """The processor of the checkpoint `source`, whose configuration is `config`.

    With torchvision (and, for SmolVLM, num2words) it is what `AutoProcessor` gives. Without them, transformers refuses
    the whole processor of a family that also takes videos; its image half needs neither, so we take that. Raises what
    transformers raises.
    """
    family = processor_class(config)
    if family is None or "video_processor" not in family.get_attributes() or _videos_readable(config.model_type):
        return AutoProcessor.from_pretrained(source, trust_remote_code=False)
    return image_only(config.model_type, family).from_pretrained(source, trust_remote_code=False)


def image_only(model_type: str, processor: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The class `processor` without its video processor: same name, same image and text handling."""
    if model_type in IMAGE_ONLY:
        return IMAGE_ONLY[model_type]

    def get_attributes(cls: type) -> list[str]:
        return [name for name in processor.get_attributes() if name != "video_processor"]

    return type(processor.__name__, (processor,), {"get_attributes": classmethod(get_attributes)})


def _videos_readable(model_type: str) -> bool:
    return is_torchvision_available() and (model_type not in IMAGE_ONLY or is_num2words_available())
