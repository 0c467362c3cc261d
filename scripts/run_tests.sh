#!/usr/bin/env bash
# Run the tests, a file per core at a time: ./scripts/run_tests.sh [pytest arguments]
#
# Without those that are marked slow: -m slow runs these, -m "" all. CI runs all.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment dev
cd "$ROOT"
exec "$PYTHON" -m pytest --numprocesses auto --dist loadfile -m "not slow" "$@"
