"""Samples and a model -> answers, attention and their scores, in memory and on disk. Knows no page."""
