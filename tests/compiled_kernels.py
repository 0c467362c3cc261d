"""Registers, spills and shared memory of the Triton kernels, compiled without a GPU.

`test_kernels.py` runs this file in a process of its own, in which Triton believes in a GPU. Kernels
are launched as on one, and compiled for it, up to the launch itself.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from opd_titan.models.kernels import attention, layers, logits

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
KIB = 1024


@dataclass(frozen=True)
class GPU:
    """Limits by compute capability (CUDA C++ Programming Guide, table of technical specifications).

    Attributes:
        program_shared: bytes that one program may have; on Ampere the 99 KiB of 8.6, where 8.0 has
            163, so that workstations run the same kernels.
        shared: bytes of a multiprocessor; a program takes 1 KiB more than it asks for.
    """

    capability: int
    program_shared: int
    shared: int
    registers: int = 65536
    warps: int = 64
    programs: int = 32


GPUS = [GPU(80, 99 * KIB, 164 * KIB), GPU(90, 227 * KIB, 228 * KIB)]


@dataclass(frozen=True)
class Compiled:
    gpu: GPU
    name: str
    warps: int
    shared: int
    registers: int
    spilled: int

    @property
    def resident(self) -> int:
        """How many programs a multiprocessor holds at once."""
        per_warp = -(-self.registers * 32 // 256) * 256
        return min(
            self.gpu.programs,
            self.gpu.warps // self.warps,
            self.gpu.registers // (per_warp * self.warps),
            self.gpu.shared // (self.shared + KIB),
        )


class Driver:
    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what is compiled is kept by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def read(gpu: GPU, name: str, kernel: Any, folder: Path) -> Compiled:
    binary = folder / f"{name}.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    command = [str(CUOBJDUMP), "--dump-resource-usage", str(binary)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    registers, stack, local = map(int, found[-1])
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    return Compiled(gpu, name, warps, shared, registers, stack + local)


@pytest.fixture(params=GPUS, ids=lambda gpu: f"sm_{gpu.capability}")
def compile_launches(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., list[Compiled]]]:
    """Call a launcher and return what it would have launched."""
    run, kernels = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels.append(read(request.param, self.__name__, kernel, tmp_path))

    def compile_launches(launcher: Callable[..., Any], *args: Any) -> list[Compiled]:
        kernels.clear()
        launcher(*args)
        return list(kernels)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    triton.runtime.driver.set_active(Driver(request.param.capability))
    yield compile_launches
    triton.runtime.driver.set_active(None)


def assert_fits(kernel: Compiled, programs: dict[int, int] | None = None, warps: int = 1) -> None:
    """Assert no spills, and this many resident programs and warps on a multiprocessor."""
    assert kernel.spilled == 0, kernel
    assert kernel.shared <= kernel.gpu.program_shared, kernel
    least = 1 if programs is None else programs[kernel.gpu.capability]
    assert kernel.resident >= least, kernel
    assert kernel.resident * kernel.warps >= warps, kernel


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def paged(H: int, G: int, K: int, S: int, N: int = 4) -> tuple[Tensor, ...]:
    table_NM, used_N = torch.zeros(N, 40, dtype=torch.int32), torch.ones(N, dtype=torch.int32)
    return zeros(N, H, K), zeros(2, S, G, K), zeros(2, S, G, K), table_NM, used_N


# Qwen3 0.6B and 1.7B, 8B, 14B, 32B and, with a small head, Qwen2.5 0.5B: H, G, K.
MODELS = [(16, 8, 128), (32, 8, 128), (40, 8, 128), (64, 8, 128), (14, 2, 64)]


@pytest.mark.parametrize(("H", "G", "K"), MODELS)
def test_decode(compile_launches: Callable, H: int, G: int, K: int) -> None:
    """Two stages of keys and values in flight, of as many programs as hide the memory's latency."""
    decode, combine = compile_launches(attention.paged_decode, *paged(H, G, K, 64))
    assert_fits(decode, programs={80: 2, 90: 3})
    assert decode.shared >= 2 * 2 * 64 * K * 2, "the pipeline is gone: blocks are not buffered"
    assert_fits(combine, warps=32)


@pytest.mark.parametrize(("H", "G", "K"), [MODELS[0], MODELS[2], MODELS[4]])
def test_prefill(compile_launches: Callable, H: int, G: int, K: int) -> None:
    starts_N1 = torch.arange(5, dtype=torch.int32)
    (prefill,) = compile_launches(attention.paged_prefill, *paged(H, G, K, 64), starts_N1, 1)
    assert_fits(prefill, warps=8)


@pytest.mark.parametrize(("H", "G", "K"), [*MODELS, (16, 1, 128)])
def test_norm_rope(compile_launches: Callable, H: int, G: int, K: int) -> None:
    q_THK, k_TGK, v_TGK = zeros(3, H + 2 * G, K).split([H, G, G], dim=1)
    weight_K, table_T1K, slots_T = zeros(K), torch.zeros(3, 1, K), torch.zeros(3, dtype=torch.int64)
    args = (q_THK, k_TGK, v_TGK, weight_K, weight_K, 1e-6, table_T1K, table_T1K)
    for cache in ([None] * 4, [zeros(2, 64, G, K), zeros(2, 64, G, K), slots_T, slots_T]):
        (kernel,) = compile_launches(layers.norm_rope, *args, *cache)
        assert_fits(kernel, warps=16)
    q_THK, k_TGK = zeros(3, H, K), zeros(3, G, K)
    args = (q_THK, k_TGK, weight_K, weight_K, 1e-6, table_T1K, table_T1K, q_THK, k_TGK)
    (kernel,) = compile_launches(layers.norm_rope_backward, *args)
    assert_fits(kernel, warps=8)


@pytest.mark.parametrize("D", [1024, 2048, 4096, 5120])
def test_norms(compile_launches: Callable, D: int) -> None:
    x_TD = zeros(3, D)
    for launcher, args in (
        (layers.norm, (x_TD, x_TD[0], 1e-6)),
        (layers.add_norm, (x_TD, x_TD, x_TD[0], 1e-6)),
        (layers.norm_backward, (x_TD, x_TD[0], 1e-6, x_TD, None)),
        (layers.norm_backward, (x_TD, x_TD[0], 1e-6, x_TD, x_TD)),
    ):
        (kernel,) = compile_launches(launcher, *args)
        assert_fits(kernel, warps=32)


@pytest.mark.parametrize("F", [3072, 12288])
def test_silu_mul(compile_launches: Callable, F: int) -> None:
    both, g_TF = zeros(3, 2 * F).chunk(2, dim=1), zeros(3, F)
    for launcher, args in ((layers.silu_mul, both), (layers.silu_mul_backward, (*both, g_TF))):
        (kernel,) = compile_launches(launcher, *args)
        assert_fits(kernel, warps=32)


def test_block_stats(compile_launches: Callable) -> None:
    (kernel,) = compile_launches(logits.block_stats, torch.zeros(2, 151_936), 0.7)
    assert_fits(kernel, warps=32)


def test_inverted_blocks(compile_launches: Callable) -> None:
    blocks_NB, row_N = torch.zeros(2, 1187), torch.zeros(2)
    (kernel,) = compile_launches(logits.block_totals, blocks_NB, blocks_NB)
    assert_fits(kernel)
    args = (torch.zeros(2, 151_936), blocks_NB, blocks_NB, row_N, row_N.double(), 0.7)
    (kernel,) = compile_launches(logits.invert_blocks, *args)
    assert_fits(kernel)
    (kernel,) = compile_launches(logits.uniforms, row_N.long(), row_N.long())
    assert_fits(kernel)


@pytest.mark.parametrize(("top_k", "top_p"), [(50, 0.9), (0, 0.9)])
def test_truncation_threshold(compile_launches: Callable, top_k: int, top_p: float) -> None:
    args = (torch.zeros(2, 151_936), top_k, top_p)
    (kernel,) = compile_launches(logits.truncation_threshold, *args)
    assert_fits(kernel, warps=16)
