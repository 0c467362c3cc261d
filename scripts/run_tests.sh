#!/usr/bin/env bash
# Run the quick tests, a file per core at a time: ./scripts/run_tests.sh [pytest arguments]
#
# -m "not long" runs what CI runs, -m long the rest, -m "" all.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment dev
cd "$ROOT"
exec "$PYTHON" -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder \
    -m "not slow and not long" "$@"
