"""The options of a run: TOML tables, command-line overrides, strict checks. Knows no torch."""

from opd_titan.config.job_config import JobConfig
from opd_titan.config.manager import load_config, to_toml
from opd_titan.errors import ConfigError

__all__ = ["ConfigError", "JobConfig", "load_config", "to_toml"]
