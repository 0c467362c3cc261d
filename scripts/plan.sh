#!/usr/bin/env bash
# Print what a recipe needs on a cluster, without a GPU: docs/planning.md.
#
#   ./scripts/plan.sh                                               the debug recipe on 8 H200
#   ./scripts/plan.sh my.toml --world-size 8,64,512 --gpu H200 --optimizer.lr 2e-6
#
# CONFIG_FILE  the recipe, if it is not the first argument (default: train_configs/debug.toml)
# --table.key value changes the recipe, as in training; --help lists the options of the cluster.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment
choose_recipe "$@"
exec "$PYTHON" -m opd_titan.plan --job.config_file "$CONFIG_FILE" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
