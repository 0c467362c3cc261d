#!/usr/bin/env bash
# Grade a model on held-out prompts: docs/evaluation.md.
#
#   ./scripts/evaluate.sh --evaluate.model outputs/debug/hf/step-40       with the recipe of that run
#   NGPU=8 CONFIG_FILE=my.toml ./scripts/evaluate.sh --evaluate.model Qwen/Qwen3-0.6B
#
# CONFIG_FILE  the recipe (default: that of the run whose dump folder contains the model, if any)
# NGPU         processes on this machine (default: the visible GPUs, or 1 on a CPU)
# All other arguments are --table.key value; --help lists them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment
[ -z "${CONFIG_FILE:-}" ] || set -- --job.config_file "$CONFIG_FILE" "$@"
exec "$PYTHON" -m opd_titan.cli.start evaluate "$@"
