#!/usr/bin/env bash
# Create everything in assets/debug again: problems, tokenizer, teacher and student. It takes about ten
# minutes on two cores. On the same type of machine with the same versions, the result is the same bit
# for bit.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment
cd "$ROOT"

rm -rf build/sft build/debug_teacher build/debug_student
"$PYTHON" scripts/make_debug_data.py --sft-folder build/sft
# The order of a sum, and so its last bits, depends on the number of threads.
export OMP_NUM_THREADS=1
for role in teacher student; do
    NGPU=1 CONFIG_FILE="train_configs/debug_$role.toml" ./scripts/run_train.sh &
done
wait -n
wait -n
for role in teacher student; do
    cp "build/debug_$role/hf/step-1600/model.safetensors" "assets/debug/$role/model.safetensors"
done
sha256sum assets/debug/*/model.safetensors
