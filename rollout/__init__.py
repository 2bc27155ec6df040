"""Prompts in, groups out: SGLang engines, the generation client, tokenisation and rollouts."""
