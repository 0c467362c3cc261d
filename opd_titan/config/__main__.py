"""`python -m opd_titan.config --job.config_file X [--table.key value ...]`: print the resolved
configuration as TOML. With `--markdown` as only argument: print docs/options.md."""

from __future__ import annotations

import sys

from opd_titan.config import ConfigError, load_config, to_toml
from opd_titan.config.reference import markdown
from opd_titan.errors import for_a_pipe


def main() -> int:
    if sys.argv[1:] == ["--markdown"]:
        text = markdown()
    else:
        try:
            text = to_toml(load_config(sys.argv[1:]))
        except ConfigError as e:
            print(e, file=sys.stderr)
            return 2
    # TOML is UTF-8 in every locale.
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # sys.stdout is typed TextIO
    with for_a_pipe():
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
