#!/usr/bin/env bash
# Run the quick tests, with one process per core: ./scripts/run_tests.sh [pytest arguments]
#
# -m "slow and not long" runs the slow tests that CI runs too, -m long the remaining ones, -m "" all.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment dev
cd "$ROOT"
exec "$PYTHON" -m pytest --numprocesses auto --dist loadfile -m "not slow and not long" "$@"
