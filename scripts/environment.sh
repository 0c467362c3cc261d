# Sourced by the other scripts: leaves $PYTHON set to an interpreter that has what is needed.
# The active Python is used when it can import everything; otherwise a .venv is made here, once.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

# find_spec: importing torch here would cost seconds on every start.
has_packages() {
    "$1" - "${@:2}" <<'PY' 2>/dev/null
import importlib.util as u, sys
sys.exit(sys.version_info < (3, 10) or not all(u.find_spec(name) for name in sys.argv[1:]))
PY
}

# prepare_environment [extra]: the extra "dev" also wants what the tests need.
prepare_environment() {
    local needed=(torch torchdata transformers datasets safetensors tyro tensorboard tqdm jinja2)
    local extra="${1:-}"
    [ "$extra" = dev ] && needed+=(pytest xdist hypothesis ruff)
    local python
    for python in python3 python "$ROOT/.venv/bin/python"; do
        if command -v "$python" >/dev/null && has_packages "$python" "${needed[@]}"; then
            PYTHON="$python"
            return
        fi
    done
    echo "No Python here has everything that is needed; making one in $ROOT/.venv" >&2
    [ -x "$ROOT/.venv/bin/python" ] || python3 -m venv "$ROOT/.venv"
    PYTHON="$ROOT/.venv/bin/python"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --constraint "$ROOT/constraints.txt" \
        --editable "$ROOT${extra:+[$extra]}" >&2
}
