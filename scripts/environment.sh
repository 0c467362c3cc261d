# Sourced by the other scripts. `prepare_environment` leaves $PYTHON set to an interpreter that has
# what is needed: the active Python when it can import everything, otherwise a .venv made here, once.
# The rest is what every launch does alike.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

# What a Python lacks of the named packages; it fails where that is nothing. find_spec: importing
# torch here would cost seconds on every start.
missing_packages() {
    "$1" - "${@:2}" <<'PY' 2>/dev/null || echo "a Python that runs"
import importlib.util as u, sys
missing = [name for name in sys.argv[1:] if u.find_spec(name) is None]
missing += ["Python 3.10 or newer"] * (sys.version_info < (3, 10))
print(", ".join(missing), end="")
PY
}

has_packages() {
    command -v "$1" >/dev/null && [ -z "$(missing_packages "$@")" ]
}

# Whether pip finds packages, by whatever it is configured with: an index, a mirror, a folder. The
# system's Python of Debian and others refuses even a dry run without the variable (PEP 668).
finds_packages() {
    PIP_BREAK_SYSTEM_PACKAGES=1 "$1" -m pip install --dry-run --ignore-installed --no-deps --quiet --disable-pip-version-check \
        --retries 0 --timeout 10 tqdm >/dev/null 2>&1
}

# prepare_environment [extra [package ...]]: the extra "dev" also wants what the tests need; so it
# does the packages that are named.
prepare_environment() {
    local needed=(torch torchdata transformers datasets safetensors pydantic tensorboard tqdm jinja2)
    needed+=("${@:2}")
    local extra="${1:-}"
    [ "$extra" = dev ] && needed+=(pytest xdist hypothesis ruff)
    local python
    for python in python3 python "$ROOT/.venv/bin/python"; do
        if has_packages "$python" "${needed[@]}"; then
            PYTHON="$python"
            return
        fi
    done
    PYTHON="$ROOT/.venv/bin/python"
    (
        # Of jobs that start at once in a new checkout one makes it, the others wait and find it.
        command -v flock >/dev/null && flock 9
        has_packages "$PYTHON" "${needed[@]}" && exit
        local missing pip=python3
        missing=$(missing_packages python3 "${needed[@]}")
        python3 -m pip --version >/dev/null 2>&1 || pip="$PYTHON"
        [ "$pip" = python3 ] || [ -x "$PYTHON" ] || python3 -m venv "$ROOT/.venv"
        finds_packages "$pip" || fail "python3 lacks $missing, and pip finds no packages here;" \
            "where it does: python3 -m pip download --dest wheels --constraint constraints.txt" \
            "'.${extra:+[$extra]}' setuptools; then here: python3 -m pip install --no-index" \
            "--find-links wheels --editable '.${extra:+[$extra]}'"
        echo "python3 lacks $missing; installing into $ROOT/.venv" >&2
        [ -x "$PYTHON" ] || python3 -m venv "$ROOT/.venv"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check \
            --constraint "$ROOT/constraints.txt" --editable "$ROOT${extra:+[$extra]}" >&2
    ) 9>"$ROOT/.venv.lock" || exit
}

fail() {
    echo "opd_titan: $*" >&2
    exit 2
}

# Sets CONFIG_FILE where the user did not.
choose_recipe() {
    if [ -z "${CONFIG_FILE:-}" ]; then
        cd "$ROOT"  # the default recipe's paths are relative to it
        CONFIG_FILE=train_configs/debug.toml
    fi
}

# The recipe with the options, as TOML. Mistakes in them are told before any worker starts.
resolve_recipe() {
    "$PYTHON" -m opd_titan.config --job.config_file "$CONFIG_FILE" "$@"
}

asks_for_help() {
    case " $* " in *" --help "* | *" -h "*) return 0 ;; esac
    return 1
}

# The GPUs that are visible on this machine; 0 without any.
visible_gpus() {
    # Set but empty hides every GPU.
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus | grep -c . || true
    else
        echo 0
    fi
}

check_processes() {
    [[ "$NGPU" =~ ^[1-9][0-9]*$ ]] || fail "NGPU is '$NGPU'; wanted a number of processes"
}

# Sets NGPU where the user did not, and the workers' environment. The arguments are the program's.
choose_processes() {
    if [ -z "${NGPU:-}" ]; then
        NGPU=$(visible_gpus)
        [ "$NGPU" -ge 1 ] || NGPU=1
    fi
    check_processes
    if asks_for_help "$@"; then NGPU=1; fi # one help, not one from each process
    set_worker_environment
}

# What NGPU workers on this machine get in their environment.
set_worker_environment() {
    # Huge pages for malloc (glibc 2.35 on): large tensors that come and go fault 512 times less, on
    # a CPU 10 to 25 % of a rollout. One arena: a background save's thread has its own otherwise,
    # which keeps 0.6 MiB more after each save (benchmarks/endurance.py).
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1}"
    # The workers share the cores, also those that drive GPUs: torchrun alone would give each one
    # thread, and an optimizer on the host needs more.
    if [ "$NGPU" -gt 1 ]; then
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(nproc) + NGPU - 1) / NGPU ))}"
    fi
}
