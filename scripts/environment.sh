# Sourced by the other scripts. `prepare_environment` sets PYTHON to an interpreter that has the
# required packages: the active Python if it can import all of them, otherwise a new .venv.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

# Print which of the named packages a Python lacks. It uses find_spec because importing torch would
# cost seconds at every start.
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

# Return whether pip finds packages with its configuration: an index, a mirror or a folder. Without
# the variable, the system Python of Debian and others refuses even a dry run (PEP 668).
finds_packages() {
    PIP_BREAK_SYSTEM_PACKAGES=1 "$1" -m pip install --dry-run --ignore-installed --no-deps --quiet --disable-pip-version-check \
        --retries 0 --timeout 10 tqdm >/dev/null 2>&1
}

# prepare_environment [extra [package ...]]: the extra "dev" adds what the tests need. Further
# packages are required too.
prepare_environment() {
    local needed=(torch transformers datasets safetensors pydantic tensorboard tqdm jinja2)
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
        # If several jobs start at once in a new checkout, one makes the .venv and the others wait.
        command -v flock >/dev/null && flock 9
        has_packages "$PYTHON" "${needed[@]}" && exit
        local missing pip=python3
        missing=$(missing_packages python3 "${needed[@]}")
        python3 -m pip --version >/dev/null 2>&1 || pip="$PYTHON"
        [ "$pip" = python3 ] || [ -x "$PYTHON" ] || python3 -m venv "$ROOT/.venv"
        finds_packages "$pip" || fail "python3 lacks $missing, and pip finds no packages here;" \
            "on a machine with network access: python3 -m pip download --dest wheels --constraint constraints.txt" \
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

# choose_recipe "$@": set CONFIG_FILE, and ARGUMENTS to the other arguments. A recipe as first argument
# wins over the variable.
choose_recipe() {
    if [[ "${1:-}" == *.toml && "$1" != -* ]]; then
        CONFIG_FILE="$1"
        shift
    fi
    ARGUMENTS=("$@")
    if [ -z "${CONFIG_FILE:-}" ]; then
        cd "$ROOT" # the default recipe's paths are relative to it
        CONFIG_FILE=train_configs/debug.toml
    fi
}
