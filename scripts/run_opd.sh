#!/usr/bin/env bash
# The interface of the prototype of opd_titan. It runs the same program as run_train.sh:
#
#   STUDENT_PATH=Qwen/Qwen3-8B-Base TEACHER_PATH=Qwen/Qwen3-8B DATA_PATH=gsm8k N_GPUS=4 \
#       bash scripts/run_opd.sh --output_dir checkpoints/mine --num_epochs 2 --learning_rate 1e-5
#
# DATA_PATH is the name of a data set (gsm8k, openthoughts) or its path. Options of the program itself
# (--rollout.group_size 4, ...) may be mixed in. All other settings come from
# train_configs/seed_gsm8k.toml.
set -euo pipefail
scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

fail() {
    echo "opd_titan: $1" >&2
    exit 2
}

dataset=gsm8k
data="${DATA_PATH:-}"
args=()
[ -z "${STUDENT_PATH:-}" ] || args+=(--student.hf_path "$STUDENT_PATH")
[ -z "${TEACHER_PATH:-}" ] || args+=(--teacher.hf_path "$TEACHER_PATH")
if [ -n "${N_GPUS:-}" ]; then
    [[ "$N_GPUS" =~ ^[1-9][0-9]*$ ]] || fail "N_GPUS is '$N_GPUS'; wanted a number of processes"
    # The prototype took 2 prompts per GPU and step.
    args+=(--rollout.prompts_per_step $((2 * N_GPUS)))
fi
while [ $# -gt 0 ]; do
    option="${1%%=*}"
    case "$option" in
        --student_model_path) key=--student.hf_path ;;
        --teacher_model_path) key=--teacher.hf_path ;;
        --output_dir) key=--job.dump_folder ;;
        --num_epochs) key=--training.epochs ;;
        --learning_rate) key=--optimizer.lr ;;
        --group_size) key=--rollout.group_size ;;
        --max_new_tokens) key=--rollout.max_new_tokens ;;
        --dataset_name | --data_path) key="" ;;
        *) args+=("$1"); shift; continue ;;
    esac
    if [[ "$1" == *=* ]]; then
        value="${1#*=}"
        shift
    else
        [ $# -ge 2 ] || fail "$option: a value is missing"
        value="$2"
        shift 2
    fi
    case "$option" in
        --dataset_name) dataset="$value" ;;
        --data_path) data="$value" ;;
        *) args+=("$key" "$value") ;;
    esac
done

# Print the name of a data set for any spelling that the prototype accepted; print a path unchanged.
canonical() {
    case "${1,,}" in
        gsm8k | openai/gsm8k) echo gsm8k ;;
        openthoughts | openthoughts3 | open-thoughts/openthoughts3-1.2m) echo openthoughts3 ;;
        *) echo "$1" ;;
    esac
}
dataset="$(canonical "$dataset")"
case "$(canonical "$data")" in
    "") ;;
    gsm8k | openthoughts3) dataset="$(canonical "$data")" ;;
    *) args=(--data.path "$data" "${args[@]}") ;;
esac
# OpenThoughts3 is a chat set; the raw format of the recipe is GSM8K's.
[ "$dataset" != openthoughts3 ] || args=(--data.template chat "${args[@]}")
export CONFIG_FILE="${CONFIG_FILE:-$scripts/../train_configs/seed_gsm8k.toml}"
[ -z "${N_GPUS:-}" ] || export NGPU="$N_GPUS"
exec "$scripts/run_train.sh" --data.dataset "$dataset" "${args[@]}"
