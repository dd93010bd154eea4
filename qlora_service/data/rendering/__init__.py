"""Training examples to token ids and a loss mask, through the base model's chat template."""
