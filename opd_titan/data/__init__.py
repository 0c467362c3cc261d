"""Prompts: sources, templates, tokenizer, and the resumable loader."""
