#!/usr/bin/env bash
# Distil a teacher into a student.
#
#   ./scripts/run_train.sh                                          the debug recipe, on anything
#   CONFIG_FILE=my.toml NGPU=8 ./scripts/run_train.sh --optimizer.lr 2e-6
#
# CONFIG_FILE  the recipe (default: train_configs/debug.toml)
# NGPU         processes on this machine (default: the visible GPUs, or 1 on a CPU)
# Every argument goes to the program as --table.key value; --help lists them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment

CONFIG_FILE="${CONFIG_FILE:-$ROOT/train_configs/debug.toml}"
if [ -z "${NGPU:-}" ]; then
    NGPU=1
    if command -v nvidia-smi >/dev/null; then
        if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
            NGPU=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
        else
            NGPU=$(nvidia-smi --list-gpus | grep -c . || true)
        fi
        [ "$NGPU" -ge 1 ] || NGPU=1
    fi
fi
case " $* " in *" --help "* | *" -h "*) NGPU=1 ;; esac # one help, not one from each process
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

if [ "$NGPU" = 1 ]; then
    exec "$PYTHON" -m opd_titan.train --job.config_file "$CONFIG_FILE" "$@"
fi
# Mistakes in the recipe or the options are told before any worker starts.
"$PYTHON" -m opd_titan.config --job.config_file "$CONFIG_FILE" "$@" >/dev/null
# On a CPU the workers share the cores.
if ! command -v nvidia-smi >/dev/null; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(nproc) + NGPU - 1) / NGPU ))}"
fi
exec "$PYTHON" -m opd_titan.launch --nproc-per-node "$NGPU" --rdzv-backend c10d \
    --rdzv-endpoint localhost:0 -m opd_titan.train --job.config_file "$CONFIG_FILE" "$@"
