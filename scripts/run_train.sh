#!/usr/bin/env bash
# Distil a teacher into a student.
#
#   ./scripts/run_train.sh                                          the debug recipe, on anything
#   CONFIG_FILE=my.toml NGPU=8 ./scripts/run_train.sh --optimizer.lr 2e-6
#
# CONFIG_FILE  the recipe (default: train_configs/debug.toml)
# NGPU         processes on this machine (default: the visible GPUs, or 1 on a CPU)
# Every argument goes to the program as --table.key value; --help lists them.
# With --plan as the first one: what the run would need on a cluster, see scripts/plan.sh.
# Several machines: scripts/multinode.slurm.
set -euo pipefail
if [ "${1:-}" = --plan ]; then
    exec "$(dirname "${BASH_SOURCE[0]}")/plan.sh" "${@:2}"
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment
choose_recipe

choose_processes "$@"

if [ "$NGPU" = 1 ]; then
    exec "$PYTHON" -m opd_titan.train --job.config_file "$CONFIG_FILE" "$@"
fi
resolve_recipe "$@" >/dev/null
exec "$PYTHON" -m opd_titan.cli.launch --nproc-per-node "$NGPU" --rdzv-backend c10d \
    --rdzv-endpoint localhost:0 -m opd_titan.train --job.config_file "$CONFIG_FILE" "$@"
