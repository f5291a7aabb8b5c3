"""The explorer: ask a model in the browser and see where it looks. Needs the extra `app`, but for `model`."""
