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

if [ -z "${CONFIG_FILE:-}" ]; then
    cd "$ROOT"  # the default recipe's paths are relative to it
    CONFIG_FILE=train_configs/debug.toml
fi
if [ -z "${NGPU:-}" ]; then
    NGPU=0
    # Set but empty hides every GPU.
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        NGPU=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)
    elif command -v nvidia-smi >/dev/null; then
        NGPU=$(nvidia-smi --list-gpus | grep -c . || true)
    fi
    [ "$NGPU" -ge 1 ] || NGPU=1
fi
if ! [[ "$NGPU" =~ ^[1-9][0-9]*$ ]]; then
    echo "opd_titan: NGPU is '$NGPU'; wanted a number of processes" >&2
    exit 2
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
