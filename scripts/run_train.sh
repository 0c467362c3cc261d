#!/usr/bin/env bash
# Distil a teacher into a student.
#
#   ./scripts/run_train.sh                                   the debug recipe, on any machine
#   NGPU=8 ./scripts/run_train.sh my.toml --optimizer.lr 2e-6
#
# CONFIG_FILE  the recipe, if it is not the first argument (default: train_configs/debug.toml)
# NGPU         processes on this machine (default: the visible GPUs, or 1 on a CPU)
# All other arguments are --table.key value; --help lists them.
# With --plan as first argument: print what the run would need on a cluster, see scripts/plan.sh.
# Several machines: scripts/multinode.slurm.
set -euo pipefail
if [ "${1:-}" = --plan ]; then
    exec "$(dirname "${BASH_SOURCE[0]}")/plan.sh" "${@:2}"
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment
choose_recipe "$@"
exec "$PYTHON" -m opd_titan.cli.start train --job.config_file "$CONFIG_FILE" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
