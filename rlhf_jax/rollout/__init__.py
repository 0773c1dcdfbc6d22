"""Prompts in, completions and their rewards out."""
