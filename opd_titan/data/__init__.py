"""Prompts: sources, templates, tokenizer, the resumable loader, and grading of answers.

Nothing is imported here, so that `opd_titan.data.grading` stays as cheap as the standard library.
"""
