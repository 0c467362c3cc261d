"""Work per phase in tokens, FLOPs and bytes, against counts by hand, by torch and by tensors.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_utils import run_distributed
from tiny_rollout import EOS, prompts, requests, tiny
from tiny_student import CPU, random_samples, tiny_qwen3, with_rollout_logprobs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from opd_titan.config import JobConfig
from opd_titan.config.resolve import resolve
from opd_titan.data.types import Prompt, Sample
from opd_titan.distill.objectives import OBJECTIVES, ObjectiveSettings
from opd_titan.distill.packing import plan_minibatches
from opd_titan.distill.scoring import score
from opd_titan.distill.update import UpdateRule, forward_backward
from opd_titan.distributed.world import ALONE, World, build_world
from opd_titan.models.attention import PackedAttention
from opd_titan.models.kernels.paged import choose_paged_attention
from opd_titan.models.logits import Distribution
from opd_titan.models.qwen3.args import Qwen3Args
from opd_titan.models.qwen3.parallelize import rank_args
from opd_titan.observability.metrics import is_scalar, work_scalars
from opd_titan.observability.peaks import Peaks, device_peaks, percent_of_peak
from opd_titan.observability.recorder import Recorder
from opd_titan.observability.step_scalars import cached_tokens_read, work
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.kv_cache import DecodeAttention, KVCache, bytes_per_token

# Sizes as in the released config.json files.
QWEN3_06B = Qwen3Args(151936, 1024, 28, 16, 8, 128, 3072, 1e-6, 1e6, True, 40960, 0.02)
QWEN3_8B = Qwen3Args(151936, 4096, 36, 32, 8, 128, 12288, 1e-6, 1e6, False, 40960, 0.02)

WORLD = World(CPU, None, ALONE, ALONE)
RULE = UpdateRule(OBJECTIVES["policy_gradient"], ObjectiveSettings(), Distribution(), 0.0)

# ---- by hand ----


def test_qwen3_0_6b_by_hand():
    # Q 1024 x 2048, K and V 1024 x 1024 each, O 2048 x 1024, three MLP matrices 1024 x 3072.
    layer = 2_097_152 + 2 * 1_048_576 + 2_097_152 + 3 * 3_145_728
    assert layer == 15_728_640
    body, head = 28 * layer, 151_936 * 1024
    # The released model has 596,049,920 parameters, the tied head once; the rest is norms.
    assert body + head + 28 * (2 * 1024 + 2 * 128) + 1024 == 596_049_920
    one = QWEN3_06B.forward_flops([1], projected_tokens=0)
    assert one == 2 * body + 4 * 28 * 16 * 128  # no embedding, no head, one attention pair
    # 3 + 2 tokens: 6 + 3 causal pairs; 4 of the 5 positions are projected.
    two = QWEN3_06B.forward_flops([3, 2], projected_tokens=4)
    assert two == 5 * 2 * body + 9 * 4 * 28 * 16 * 128 + 4 * 2 * head
    # The tied head's 155,582,464 parameters are read in every decode forward, in bf16; its rows
    # as an embedding are not. A cached token is 28 layers x 8 heads x 128, key and value.
    assert QWEN3_06B.decode_bytes(1, 0, dtype_bytes=2) == 2 * (body + head) == 1_191_968_768
    assert QWEN3_06B.decode_bytes(0, 1, dtype_bytes=2) == 2 * 57_344
    assert QWEN3_06B.decode_bytes(3, 50, dtype_bytes=4) == 4 * (3 * 595_984_384 + 50 * 57_344)


def test_qwen3_8b_by_hand():
    # Q and O 4096 x 4096, K and V 4096 x 1024 each, three MLP matrices 4096 x 12288.
    layer = 2 * 16_777_216 + 2 * 4_194_304 + 3 * 50_331_648
    assert layer == 192_937_984
    body, head = 36 * layer, 151_936 * 4096
    # The released model has 8,190,735,360 parameters: embedding and head apart, and norms.
    assert body + 2 * head + 36 * (2 * 4096 + 2 * 128) + 4096 == 8_190_735_360
    # One sequence of 4096 tokens: 8,390,656 causal pairs, of 4 x 128 in 36 x 32 heads.
    forward = QWEN3_8B.forward_flops([4096], projected_tokens=4096)
    assert forward == 4096 * 2 * (body + head) + 8_390_656 * 589_824 == 66_946_863_202_304
    # torchtitan's 52.7 G per token, forward and backward, counts both triangles of the pairs.
    triangle = (4096 * 4096 - 8_390_656) * 589_824
    assert 3 * (forward + triangle) / 4096 == pytest.approx(52.7e9, rel=1e-3)
    assert QWEN3_8B.decode_bytes(1, 0, dtype_bytes=2) == 2 * (body + head) == 15_136_194_560
    # 32 sequences in the middle of 1024 new tokens hold 4.8 GB of keys and values: 147,456 B each.
    assert QWEN3_8B.decode_bytes(0, 32 * 1024, dtype_bytes=2) == 32 * 1024 * 147_456


def sample(index: int, prompt_tokens: int, response_tokens: int, sample_index: int = 0) -> Sample:
    prompt = Prompt(index, "", (1,) * prompt_tokens)
    return Sample(prompt, sample_index, [1] * response_tokens, "length")


def test_work_of_a_step_by_hand():
    # Two answers to a prompt of 3 tokens, one to a prompt of 2.
    samples = [sample(7, 3, 2, 0), sample(7, 3, 4, 1), sample(9, 2, 1, 0)]
    calls = []

    def student(lengths: Sequence[int], projected: int) -> float:
        calls.append((list(lengths), projected))
        return 100.0 * sum(lengths) + projected

    tokens, flops = work(samples, {"student": student})
    # The last token of a sequence is never fed in; all 7 response tokens are predicted.
    assert tokens == {"rollout": 7, "update": 4 + 6 + 2, "step": 7}
    # The second answer's prompt is not run again: in a rollout but for its last token.
    assert calls == [([4, 6, 2], 7), ([3], 0), ([4, 6, 2], 7), ([2], 0)]
    assert flops == {"update": 3 * 907.0, "rollout": 1007.0}
    tokens, flops = work(samples, {"student": student, "teacher": lambda n, r: 5.0 * sum(n) + r})
    assert tokens["teacher"] == 12 and flops["teacher"] == 52.0
    # Each token is fed in at position p and attends to p + 1 tokens: the first answer's at 2 and 3,
    # the second's at 2, 3, 4, 5, the third's at 1.
    assert cached_tokens_read(samples) == (3 + 4) + (3 + 4 + 5 + 6) + 2


# ---- by torch ----


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """Count matrix products with torch; on a CPU only the plain attention is made of them."""

    def product(_sum: Any, a: Sequence[int], b: Sequence[int], **_: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    def attention(q: Sequence[int], k: Sequence[int], _v: Any, *_: Any, **__: Any) -> int:
        return 4 * q[0] * q[1] * q[2] * k[2] * q[3]

    # torch does not count a product that is added in place, nor before 2.14 this attention.
    more = {
        torch.ops.aten.addmm_: product,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    }
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=more) as mode:
        yield mode


def upper_triangle(args: Qwen3Args, seq_lens: Sequence[int]) -> int:
    """Return the FLOPs of the pairs that the plain attention computes and masks."""
    pairs = sum(n * n - n * (n + 1) // 2 for n in seq_lens)
    return 4 * args.n_layers * args.n_heads * args.head_dim * pairs


# Lengths of a pack are equal or too different to be padded to one.
PACKS = [[(1, 1)], [(3, 6)], [(5, 4), (1, 8), (30, 45), (70, 5)]]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lengths", PACKS)
def test_scoring_and_update_cost_what_torch_counts(tied, lengths):
    model = tiny_qwen3(tied=tied)
    samples = with_rollout_logprobs(model, random_samples(lengths))
    seq_lens = [s.num_tokens - 1 for s in samples]
    plan = plan_minibatches(samples, 1, 1 << 30, ALONE)
    with counted() as scoring:
        score(model, plan, Distribution(), WORLD)
    with counted() as update:
        forward_backward(model, samples, plan[0].response_tokens, RULE, WORLD)
    tokens, flops = work(samples, dict.fromkeys(("student", "teacher"), model.args.forward_flops))
    assert tokens["teacher"] == sum(seq_lens)
    masked = upper_triangle(model.args, seq_lens)
    assert scoring.get_total_flops() == flops["teacher"] + masked
    assert update.get_total_flops() == flops["update"] + 3 * masked


def test_recomputation_is_no_work():
    model = tiny_qwen3()
    tokens_T = torch.arange(8)
    attend = PackedAttention([8], CPU)

    def loss() -> Tensor:
        return model(tokens_T, attend, lambda h_TD, w_VD: (h_TD @ w_VD.t()).logsumexp(1).sum())

    with counted() as plain:
        loss().backward()
    with counted() as recomputed:
        torch.utils.checkpoint.checkpoint(loss, use_reentrant=False).backward()
    three = 3 * (model.args.forward_flops([8], 8) + upper_triangle(model.args, [8]))
    assert plain.get_total_flops() == three < recomputed.get_total_flops()


@pytest.mark.parametrize("tied", [True, False])
def test_a_rollout_costs_what_torch_counts(tied):
    """Prompts once per group, one row of logits per sampled token, attention by true lengths."""
    model = tiny(tied=tied)
    some = prompts([5, 5, 5])
    # With pages of one token, no attention to unused slots.
    generator = Generator(model, EOS, page_size=1)
    with counted() as counter:
        samples = generator.generate(
            requests(some, 4), SamplingParams(max_new_tokens=7, ignore_eos=True)
        )
    tokens, flops = work(samples, {"student": model.args.forward_flops})
    assert tokens["rollout"] == 3 * 4 * 7
    masked = upper_triangle(model.args, [4, 4, 4])
    assert counter.get_total_flops() == flops["rollout"] + masked
    # With one sample per prompt nothing is shared, and the cost is that of scoring it.
    first = [s for s in samples if s.sample_index == 0]
    _, flops = work(first, dict.fromkeys(("student", "teacher"), model.args.forward_flops))
    assert flops["rollout"] == flops["teacher"] == flops["update"] / 3


# ---- by tensors ----


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_bytes_are_those_of_the_tensors(tied, dtype):
    model = tiny_qwen3(tied=tied).to(dtype)
    matrices = [p for layer in model.layers for p in layer.parameters() if p.dim() == 2]
    assert len(matrices) == 7 * model.args.n_layers
    weights = sum(p.nbytes for p in [*matrices, model.lm_head.weight])
    assert model.args.decode_bytes(1, 0, dtype.itemsize) == weights
    path = choose_paged_attention(model.args.head_dim, dtype, CPU)
    cache = KVCache(model.args, num_pages=2, page_size=5, path=path, dtype=dtype, device=CPU)
    assert cache.num_bytes == sum(t.nbytes for t in (*cache.keys, *cache.values))
    size = cache.num_bytes  # of the two pages and the idle one
    assert model.args.decode_bytes(0, 3 * 5, dtype.itemsize) == size
    assert bytes_per_token(model.args, dtype) == size / (3 * 5)


def test_a_share_of_the_model_reads_a_share_of_the_bytes():
    """Two tensor-parallel ranks together do the work of one whole model."""
    share = rank_args(QWEN3_8B, 2, "config.json")
    assert 2 * share.decode_bytes(10, 999, 2) == QWEN3_8B.decode_bytes(10, 999, 2)
    assert 2 * share.forward_flops([30, 4], 9) == QWEN3_8B.forward_flops([30, 4], 9)


class Reads:
    """Count what a generator's decode forwards attend to, as the model sees it."""

    def __init__(self, model: nn.Module) -> None:
        self.forwards = self.cached_tokens = 0
        model.register_forward_pre_hook(self._see)

    def _see(self, _model: nn.Module, inputs: tuple[Tensor, Any]) -> None:
        attend = inputs[1]
        if isinstance(attend, DecodeAttention):
            self.forwards += 1
            self.cached_tokens += int((attend.positions_T + 1).sum())


@pytest.mark.parametrize("slots", [0, 3])
def test_a_rollout_reads_what_is_counted(slots):
    """Prompts and responses of many lengths; with few slots it takes more, emptier forwards."""
    model = tiny()
    generator, reads = Generator(model, EOS, slots), Reads(model)
    samples = generator.generate(requests(prompts(), 3), SamplingParams(max_new_tokens=25))
    assert len({len(s.response_ids) for s in samples}) > 5
    assert cached_tokens_read(samples) == reads.cached_tokens
    assert generator.stats.decode_forwards == reads.forwards
    if slots == 0:
        assert reads.forwards == max(len(s.response_ids) for s in samples)
    # Each call counts anew.
    generator.generate(requests(prompts([4]), 2), SamplingParams(max_new_tokens=1))
    assert generator.stats.decode_forwards == 1


def recorded(folder: str, forwards: list[int], **degrees: int) -> dict[str, float]:
    """Return a step's scalars.

    Args:
        forwards: of each data-parallel rank's rollout.
    """
    world = build_world(CPU, **degrees)
    config = JobConfig()
    config.job.dump_folder = folder
    config.parallelism.tensor_parallel_degree = degrees.get("tensor", 1)
    config.metrics.enable_tensorboard, config.metrics.sample_rollouts = False, 0
    recorder = Recorder(
        resolve(config, "cpu", dist.get_world_size()),
        world=world,
        dtype=torch.bfloat16,
        decode=str,
        grade=lambda response, answer: None,
        forward_flops={"student": QWEN3_06B.forward_flops},
        decode_bytes=QWEN3_06B.decode_bytes,
        start_step=0,
        total_steps=2,
    )
    assert recorder.peaks == Peaks()  # of a CPU
    recorder.peaks = Peaks(1e15, 1e12)
    samples = with_logprobs([sample(7, 3, 2, 0), sample(7, 3, 4, 1), sample(9, 2, 1, 0)])
    with recorder.clock.phase("rollout"):
        pass
    own = forwards[world.dp.rank]
    recorder.record(1, samples, {}, decode_forwards=own, preempted=own, seconds=float(own))
    return recorder.metrics.last


def recorded_on_two_ranks(folder: str) -> list[dict[str, float]]:
    # Answers of 2 and 4 tokens take 4 forwards, one of 1 token 1.
    return [recorded(folder, [4, 1], shard=2), recorded(folder, [5], tensor=2)]


def with_logprobs(samples: list[Sample]) -> list[Sample]:
    for s in samples:
        s.student_logprobs = torch.zeros(len(s.response_ids))
    return samples


@pytest.mark.slow
def test_the_recorder_counts_a_tensor_parallel_forward_once(tmp_path):
    read = QWEN3_06B.decode_bytes(5, (3 + 4) + (3 + 4 + 5 + 6) + 2, 2)
    run = run_distributed(recorded_on_two_ranks, 2, str(tmp_path))
    for last in chain(*run):
        seconds = last["time/rollout(s)"]
        assert last["mbu/rollout(%)"] == pytest.approx(100 * read / (seconds * 2 * 1e12))
        assert last["throughput/rollout(tok/s/gpu)"] == pytest.approx(7 / seconds / 2)
        assert last["rollout/preempted"] == 5.0
    (two, one), _ = run
    assert two["rollout/idle_share"] == pytest.approx(1 - (4 + 1) / 2 / 4)
    assert one["rollout/idle_share"] == 0.0


# ---- peaks ----


@pytest.mark.parametrize(
    ("name", "flops", "bandwidth"),
    [
        ("NVIDIA H200", 989e12, 4.8e12),
        ("NVIDIA H200 NVL", 835e12, 4.8e12),
        ("NVIDIA GH200 120GB", 989e12, 4.0e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12),
        ("NVIDIA H800", 989e12, 3.35e12),
        ("NVIDIA H20-3e", 148e12, None),
        ("A100-SXM4-40GB", 312e12, 1.555e12),  # older drivers
        ("NVIDIA A100 80GB PCIe", 312e12, 1.935e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 1.008e12),
    ],
)
def test_peaks_by_name(name, flops, bandwidth):
    assert device_peaks(name) == Peaks(flops, bandwidth)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA L40S-48Q",
        "GRID A100-10C",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA L40",
        "NVIDIA GB200",
        "AMD Instinct MI300X",
        "cpu",
    ],
)
def test_slices_and_unknown_devices_have_no_peaks(name):
    assert device_peaks(name) == Peaks(None, None)


def test_percent_of_peak():
    assert percent_of_peak(989e12 * 3, 10.0, 989e12, world_size=2) == pytest.approx(15.0)


# ---- scalars ----


def test_work_is_per_second_and_device():
    seconds = {"rollout": 2.0, "update": 4.0, "step": 8.0, "sync": 0.0}
    tokens = {"rollout": 800, "update": 1600, "step": 800, "teacher": 5}
    work = seconds, tokens, {"rollout": 1e12, "update": 8e12}, {"rollout": 6e11}
    scalars = work_scalars(*work, world_size=2, peaks=Peaks(10e12, 1e12))
    assert scalars == {
        "throughput/rollout(tok/s/gpu)": 200.0,
        "throughput/update(tok/s/gpu)": 200.0,
        "throughput/step(tok/s/gpu)": 50.0,
        "mfu/rollout(%)": 2.5,
        "mfu/update(%)": 10.0,
        "mbu/rollout(%)": 15.0,
    }
    assert all(map(is_scalar, scalars))
    unknown = work_scalars(*work, world_size=2, peaks=Peaks(None, 1e12))
    assert [name for name in unknown if "(%)" in name] == ["mbu/rollout(%)"]
