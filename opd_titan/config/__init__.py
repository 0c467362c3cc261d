"""The options of a run: TOML tables, command-line overrides, strict checks. Knows no torch."""

from opd_titan.config.job_config import JobConfig
from opd_titan.config.manager import load_config, to_toml
from opd_titan.errors import ConfigError

# The resolved recipe, in a dump folder and beside the results of an evaluation.
RECIPE_FILE = "config.resolved.toml"

__all__ = ["RECIPE_FILE", "ConfigError", "JobConfig", "load_config", "to_toml"]
