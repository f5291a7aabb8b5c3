"""An OpenAI-compatible server for a model and its adapters. Needs the extra `serve`, but for `request` and `worker`."""
