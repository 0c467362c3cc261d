"""The rollout viewer, one self-contained HTML page: `python -m opd_titan.view <dump_folder>`.

It reads the files of a run and does not import torch, so that it starts quickly.
"""
