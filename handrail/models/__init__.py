"""Language models: rendering, generation, scoring and trainable weights."""
