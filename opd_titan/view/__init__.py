"""Rollout files as one HTML page that needs no network: `python -m opd_titan.view <dump_folder>`.

Reads what a run left behind and never torch, so that it starts in a moment, anywhere.
"""
