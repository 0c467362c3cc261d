"""Prompts: data sets, templates, the tokenizer, the cache, and the resumable loader."""
