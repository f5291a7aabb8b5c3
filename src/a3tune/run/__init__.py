"""The run folder: its files by name, and stages that run once. Knows not what the files say."""
