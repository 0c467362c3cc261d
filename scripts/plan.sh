#!/usr/bin/env bash
# What a recipe will need on a cluster, without a GPU: docs/planning.md.
#
#   ./scripts/plan.sh                                               the debug recipe on 8 H200
#   CONFIG_FILE=my.toml ./scripts/plan.sh --world-size 8,64,512 --gpu H200 --optimizer.lr 2e-6
#
# CONFIG_FILE  the recipe (default: train_configs/debug.toml)
# Every --table.key value goes to the recipe, as in training; --help lists the cluster's options.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment
choose_recipe

exec "$PYTHON" -m opd_titan.plan --job.config_file "$CONFIG_FILE" "$@"
