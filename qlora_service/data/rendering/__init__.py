"""Training examples to token ids and the loss mask, through the base model's chat template."""
