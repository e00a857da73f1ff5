"""Real engines load what we write: the last word on every format."""
