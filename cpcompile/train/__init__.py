"""Train: the command that fine-tunes a causal language model with its sequence sharded over ranks."""
