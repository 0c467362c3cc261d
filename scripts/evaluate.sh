#!/usr/bin/env bash
# Grade a model on held-out prompts: docs/evaluation.md.
#
#   ./scripts/evaluate.sh --evaluate.model outputs/debug/hf/step-40       with that run's own recipe
#   CONFIG_FILE=my.toml NGPU=8 ./scripts/evaluate.sh --evaluate.model Qwen/Qwen3-0.6B
#
# CONFIG_FILE  the recipe (default: that of the run whose dump folder holds the model, if any)
# NGPU         processes on this machine (default: the visible GPUs, or 1 on a CPU)
# Every argument goes to the program as --table.key value; --help lists them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment

choose_processes "$@"
[ -z "${CONFIG_FILE:-}" ] || set -- --job.config_file "$CONFIG_FILE" "$@"

if [ "$NGPU" = 1 ]; then
    exec "$PYTHON" -m opd_titan.evaluate "$@"
fi
exec "$PYTHON" -m opd_titan.cli.launch --nproc-per-node "$NGPU" --rdzv-backend c10d \
    --rdzv-endpoint localhost:0 -m opd_titan.evaluate "$@"
