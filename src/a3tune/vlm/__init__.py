"""Which image token sees which pixels. The only room that knows model families."""
