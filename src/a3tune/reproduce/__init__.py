"""The paper's tables and figures: what each compares, running it, and the outcome beside the published numbers."""
