"""What gives a folder of a ranker away: the file, and what it says. Names only."""

BIOMEDCLIP_CONFIG = "open_clip_config.json"
"""File of a BiomedCLIP as published."""
CLIP_TYPES = ("clip", "siglip", "siglip2")
"""`model_type` in a ranker's config.json, as transformers has it; MedSigLIP and SigLIP 2 of fixed size say `siglip`."""
