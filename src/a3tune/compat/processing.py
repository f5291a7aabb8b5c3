"""How transformers' processors cut images, and which processor belongs to which configuration."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.image_processing_utils import select_best_resolution
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.utils.import_utils import is_num2words_available, is_torchvision_available

__all__ = [
    "get_optimal_tiled_canvas",
    "get_resize_output_image_size",
    "is_num2words_available",
    "is_torchvision_available",
    "processor_class",
    "select_best_resolution",
    "smart_resize",
]


def processor_class(config: PreTrainedConfig) -> Any:
    """The processor that `AutoProcessor` would make for a model; None if it knows none."""
    return PROCESSOR_MAPPING.get(type(config), None)
