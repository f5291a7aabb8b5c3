"""What gives a folder of a ranker away: the file, and what it says. Names only."""

SHIPPED = "tiny"
"""`labels.ranker` of the one in the package."""
BIOMEDCLIP_CONFIG = "open_clip_config.json"
"""File of a BiomedCLIP as published."""
BIOMEDCLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Its weights, the first of them that is there; of the second only tensors are read."""
CLIP_TYPES = ("clip", "siglip", "siglip2")
"""`model_type` in a ranker's config.json, as transformers has it; MedSigLIP and SigLIP 2 of fixed size say `siglip`."""
