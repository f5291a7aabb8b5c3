"""Where to look, in pixels of the original image. Knows no VLM."""
