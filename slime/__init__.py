"""slime: asynchronous RL post-training for language models."""
