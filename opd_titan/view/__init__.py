"""Rollout files as one HTML page that needs no network: `python -m opd_titan.view <dump_folder>`.

It reads what a run wrote and does not import torch, so it starts quickly anywhere.
"""
