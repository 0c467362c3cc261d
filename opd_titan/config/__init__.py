"""The configuration of a run: TOML tables and command-line overrides. Does not import torch."""

from opd_titan.config.job_config import JobConfig
from opd_titan.config.manager import load_config, to_toml
from opd_titan.errors import ConfigError

# The resolved recipe, in the dump folder and next to the results of an evaluation.
RECIPE_FILE = "config.resolved.toml"

__all__ = ["RECIPE_FILE", "ConfigError", "JobConfig", "load_config", "to_toml"]
