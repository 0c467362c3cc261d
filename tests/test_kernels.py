"""The fused kernels without a GPU: interpreted, compiled, on tensors without data, and absent.

Triton interprets or compiles depending on the environment at the start of its process, so these
tests start processes.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

TESTS = Path(__file__).parent

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def version(package: str) -> tuple[int, ...]:
    return tuple(int(x) for x in importlib.metadata.version(package).split(".")[:2])


def run_tests(file: str, **environment: str) -> None:
    """Run another file's tests with this Python."""
    path = os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(TESTS / file)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("file", ["interpreted_layers.py", "interpreted_attention.py"])
def test_interpreted_kernels_are_their_twins(file: str) -> None:
    if version("triton") < (3, 7) and version("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 fails with NumPy from 2.4 on")
    run_tests(file, TRITON_INTERPRET="1")


@pytest.mark.long
@needs_triton
def test_compiled_kernels_do_not_spill(tmp_path: Path) -> None:
    run_tests("compiled_kernels.py", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")


@needs_triton
def test_operators_know_the_shapes_of_tensors_without_data() -> None:
    from opd_titan.models.kernels import attention, layers, logits  # noqa: F401

    ops, device = torch.ops.opd_titan, "cuda" if torch.version.cuda else "cpu"
    with FakeTensorMode(), torch.device(device):
        half = {"dtype": torch.bfloat16}
        q, k = torch.empty(5, 16, 128, **half), torch.empty(5, 8, 128, **half)
        x, weight = torch.empty(5, 1024, **half), torch.empty(128, **half)
        angles, fp32 = torch.empty(5, 1, 128), torch.empty(5, 1000)
        cache = [torch.empty(9, 64, 8, 128, **half) for _ in range(2)]
        slots = [torch.empty(5, dtype=torch.int64) for _ in range(2)]
        table, used = torch.empty(5, 3, dtype=torch.int32), torch.empty(5, dtype=torch.int32)
        starts = torch.empty(6, dtype=torch.int32)
        rope = (q, k, k, weight, weight, 1e-6, angles, angles)
        results = [
            (ops.silu_mul(*x.chunk(2, dim=1)), ((5, 512), torch.bfloat16)),
            (ops.add_norm(x, x, x[0], 1e-6), ((5, 1024), torch.bfloat16)),
            (ops.norm_rope(*rope, *cache, *slots)[:1], ((5, 16, 128), torch.bfloat16)),
            (ops.norm_rope(*rope, None, None, None, None)[1:], ((5, 8, 128), torch.bfloat16)),
            (ops.paged_decode(q, *cache, table, used), ((5, 16, 128), torch.bfloat16)),
            (ops.paged_prefill(q, *cache, table, used, starts, 1), ((5, 16, 128), torch.bfloat16)),
            (ops.block_stats(fp32, 1.0), ((5, 8), torch.float32)),
            (ops.truncation_threshold(fp32, 9, 0.9)[:1], ((5,), torch.float32)),
            (ops.truncation_threshold(fp32, 9, 0.9)[1:], ((5,), torch.int64)),
        ]
    for tensors, (shape, dtype) in results:
        for tensor in tensors if isinstance(tensors, tuple) else (tensors,):
            assert tensor.shape == shape and tensor.dtype == dtype
            assert tensor.device.type == device and tensor.is_contiguous()


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from opd_titan.models import kernels
x = torch.randn(3, 8)
assert kernels.silu_mul(x, x).shape == (3, 8)
assert kernels.add_norm(x, x, x[0], 1e-6)[1].shape == (3, 8)
assert kernels.block_stats(x, 1.0)[0].shape == (3, 1)
assert kernels.truncation_threshold(x, 2, 0.5)[0].shape == (3,)
q, k, table = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 1, 8)
cache = torch.zeros(2, 1, 4, 2, 8)
slots = kernels.CacheSlots(*cache, torch.zeros(3).long(), torch.arange(3))
assert kernels.norm_rope(q, k, k, x[0], x[1], 1e-6, table, table, slots)[0].shape == q.shape
assert torch.equal(cache[1, 0, :3], k)
"""


def test_the_package_and_its_twins_need_no_triton() -> None:
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], env=environment, check=True)
