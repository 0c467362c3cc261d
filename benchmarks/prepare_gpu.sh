#!/usr/bin/env bash
# For a GPU machine that reaches no network: put the wheels that an image with Python 3.12, torch and
# transformers usually lacks into .whl/, which git ignores. It is then copied along with the rest.
#
#   ./benchmarks/prepare_gpu.sh              here
#   python3 -m pip install --no-index --no-deps --target /tmp/site .whl/*.whl      there
#   export PYTHONPATH=/tmp/site              there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
rm -rf .whl
pinned=(torchdata pydantic datasets math-verify latex2sympy2-extended antlr4-python3-runtime)
# What these need besides, in any version.
wheels=(docstring-parser typeguard dill multiprocess)
for name in "${pinned[@]}"; do
    wheels+=("$(grep "^$name==" constraints.txt)")
done
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp --platform any --platform manylinux2014_x86_64 \
    --platform manylinux_2_28_x86_64 --dest .whl "${wheels[@]}"
du -sh .whl
