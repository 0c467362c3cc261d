"""The planner against hand counts, against itself, and against a real run's memory."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_plan import H200, SIZES, TIGHT, rank_share, resolved, tp
from torch._subclasses.fake_tensor import FakeTensorMode

from opd_titan.config import JobConfig, load_config
from opd_titan.errors import UserError
from opd_titan.models.kernels import fused
from opd_titan.models.kernels.device import Device
from opd_titan.models.kernels.paged import choose_paged_attention
from opd_titan.plan.__main__ import main
from opd_titan.plan.estimate import Estimate, estimate
from opd_titan.plan.remedies import remedies
from opd_titan.plan.simulate import simulate
from opd_titan.plan.tracker import TensorsWithoutData

REPO = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------ resident


SFT = ("--distill.objective", "sft", "--rollout.on_policy_fraction", 0, "--rollout.group_size", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "ranks", "degree"),
    [("8B", 8, 1), ("8B", 64, 8), ("8B", 512, 1), ("0.6B", 8, 1)],
)
def test_what_stays_is_what_a_hand_counts(planned: Any, size: str, ranks: int, degree: int) -> None:
    cluster = replace(H200, world_size=ranks)
    _, simulation, _ = planned(size, size, *SFT, *tp(degree), cluster=cluster)
    mine = rank_share(size, ranks, degree)
    resident = simulation.resident
    assert resident["student weights"] == simulation.gradients == 4 * mine
    moments = resident["optimizer state"]
    assert 8 * mine <= moments < 8 * mine + 1e5  # the step counts, of 4 bytes each
    assert resident["generator weights"] == 0  # nothing samples
    if (size, ranks) == ("8B", 8):
        assert mine == pytest.approx(8_190_735_360 / 8, rel=1e-6)
    if size == "0.6B":
        assert mine == pytest.approx(596_049_920 / 8, rel=1e-6)  # embedding and head once


def test_a_teacher_is_stored_as_it_computes(planned: Any) -> None:
    _, simulation, _ = planned("tiny", "wide")
    assert simulation.resident["teacher weights"] == 2 * rank_share("wide", 8)


@pytest.mark.parametrize("degree", [1, 4])
def test_kv_cache(planned: Any, degree: int) -> None:
    _, simulation, _ = planned("wide", "tiny", *tp(degree))
    _, layers, _, heads, k, *_ = SIZES["wide"]
    sequences = 16 * 2 // (8 // degree)
    rollout = simulation.rollout
    assert rollout.slots == rollout.pages == sequences and rollout.page_size == 64
    assert simulation.resident["generator weights"] == 2 * rank_share("wide", degree, degree)
    # One page more, for rows without a sequence; keys and values of two bytes.
    tokens = 64 * (sequences + 1)
    assert rollout.kv_cache == 2 * layers * tokens * (heads // degree) * k * 2
    logits = 4 * sequences * SIZES["wide"][-2] // degree
    assert simulation.phases["rollout"].peak > rollout.kv_cache + logits
    # What is kept beside it: tokens and log-probs, and the logits.
    kept = rollout.kept - rollout.kv_cache
    assert sequences * (4 + 4) * 32 + logits < kept < 2**20


def test_more_sequences_than_fit_take_turns(planned: Any) -> None:
    options = ("--rollout.max_concurrent", 3)
    _, simulation, _ = planned("tiny", "tiny", *options)
    assert simulation.rollout.slots == 3 and simulation.rollout.preempted == 0
    assert simulation.rollout.decode_forwards == 2 * 32  # three, then one


def test_the_generators_memory_stays_if_the_run_would_keep_it(planned: Any) -> None:
    _, simulation, found = planned("wide", "tiny")
    assert simulation.stays
    kept = simulation.resident["generator weights"] + simulation.rollout.kept
    assert found.peak == H200.held(simulation.phases["update"].peak + kept)
    # The update needs more than the memory, by the estimate of what stays gathered.
    assert not planned("wide", "tiny", cluster=TIGHT)[1].stays
    assert not planned("wide", "tiny", *SFT)[1].stays  # nothing samples


def test_shorter_responses_take_fewer_steps_and_the_same_cache(arguments: Any) -> None:
    options = arguments("tiny", "tiny", "--rollout.max_concurrent", 3)
    job = resolved(load_config(options), H200)
    full, half = (simulate(job, H200, 32, tokens).rollout for tokens in (32, 16))
    options += ["--rollout.max_tokens_per_step", str(32 * 16)]
    limited = simulate(resolved(load_config(options), H200), H200, 32, 32).rollout
    assert limited.decode_forwards == half.decode_forwards
    # Two rounds of responses. Those that end before the limit are seen to have a step late.
    assert half.decode_forwards == full.decode_forwards / 2 + 2
    assert half.kv_cache == full.kv_cache and half.slots == full.slots


@pytest.mark.parametrize("response", [1000, 480])
def test_where_memory_is_short_some_are_preempted(arguments: Any, response: int) -> None:
    """There are pages for half of what the responses may have."""
    options = ("--rollout.max_new_tokens", 1000, "--rollout.group_size", 32)
    cluster = replace(H200, memory=5e7, reserve=0.0)
    job = resolved(load_config(arguments("tiny", "tiny", *options)), cluster)
    simulation = simulate(job, cluster, 24, response)
    rollout = simulation.rollout
    assert 1 < rollout.slots < 64 and rollout.pages // rollout.slots == 8
    again = sum(end - start for start, end in rollout.prefilled) - 2 * 23
    if response == 480:
        assert rollout.preempted == again == 0
    else:
        assert rollout.preempted > 0 and again > 100 * rollout.preempted
    least = math.ceil(64 * response / rollout.slots)
    assert least <= rollout.decode_forwards < 2 * least
    found = estimate(job, cluster, simulation).seconds["rollout"].busy
    simulation.rollout = replace(rollout, prefilled=rollout.prefilled[:2])  # the prompts
    assert (found > estimate(job, cluster, simulation).seconds["rollout"].busy) == (again > 0)


# ------------------------------------------------------------------- traffic


def test_copies_of_the_model_exchange_gradients_alone(planned: Any) -> None:
    degrees = "--parallelism.data_parallel_replicate_degree", 4
    _, simulation, _ = planned("wide", "tiny", *degrees)
    assert simulation.axes == {"dp_replicate": 4, "dp_shard": 2}
    mine, phases = rank_share("wide", 2), simulation.phases
    assert phases["update"].sent["dp_replicate"] == 2 * 3 / 4 * 4 * mine
    assert phases["teacher"].sent["dp_replicate"] == phases["sync"].sent["dp_replicate"] == 0
    assert simulation.resident["student weights"] == 4 * mine


def test_traffic_of_a_split_layer(planned: Any) -> None:
    both = [planned(s, s, *tp(4))[1] for s in ("tiny", "tiny, a layer more")]
    degree, (d, _, _, _, k, *_) = 4, SIZES["tiny"]
    prompts = 16 // 2  # of two data-parallel ranks; two samples of each
    tokens = prompts * (32 + 2 * (32 - 1))

    def of_a_layer(phase: str) -> tuple[float, float]:
        less, more = (s.phases[phase] for s in both)
        sent = more.sent["tp"] - less.sent["tp"]
        return sent, more.collectives["tp"] - less.collectives["tp"]

    # Attention and MLP each gather the tokens and scatter a sum; the backward does the reverse.
    one = tokens * d * 2 * (degree - 1) / degree
    assert of_a_layer("teacher") == (4 * one, 4)
    # The four norms' gradients are summed over the ranks, in bf16 or (torch 2.15) fp32.
    norms = 2 * (degree - 1) / degree * 2 * (2 * d + 2 * k)
    sent, collectives = of_a_layer("update")
    assert sent - 8 * one in (norms, 2 * norms) and collectives == 12
    # A rollout sums all tokens twice a layer: each prompt once but for its last
    # token, then one token a sample and step.
    fed = prompts * 31 + 2 * prompts * 32
    sent, collectives = of_a_layer("rollout")
    assert sent == pytest.approx(2 * 2 * fed * d * 2 * (degree - 1) / degree)
    assert collectives == 2 * (1 + 32)


def test_links() -> None:
    cluster = replace(H200, gpus_per_node=8, node_bandwidth=450.0, network_bandwidth=50.0)
    assert cluster.link(stride=1, ranks=8) == 450
    assert cluster.link(stride=1, ranks=64) == 400  # eight links lead out of a node
    assert cluster.link(stride=2, ranks=4) == 450
    assert cluster.link(stride=2, ranks=32) == 200
    assert cluster.link(stride=8, ranks=8) == 50
    assert cluster.link(stride=64, ranks=8) == 50
    assert replace(cluster, network_bandwidth=100.0).link(1, 64) == 450


# ---------------------------------------------------------------------- time


@pytest.mark.parametrize("field", ["flops", "bandwidth", "node_bandwidth", "network_bandwidth"])
@pytest.mark.parametrize("degree", [1, 4])
def test_a_faster_device_or_link_is_never_slower(planned: Any, field: str, degree: int) -> None:
    cluster = replace(H200, gpus_per_node=2)
    job, simulation, found = planned("wide", "tiny", *tp(degree), cluster=cluster)
    faster = replace(cluster, **{field: 2 * getattr(cluster, field)})
    again = estimate(job, faster, simulation)
    for name, seconds in found.seconds.items():
        assert 0 <= again.seconds[name].total <= seconds.total
    assert again.peak == found.peak


def test_the_busiest_rank_sets_the_pace(planned: Any) -> None:
    """16 prompts on 64 ranks: most have nothing to sample, and nobody is done sooner."""
    full, sparse = (
        planned("wide", "tiny", cluster=replace(H200, world_size=ranks)) for ranks in (16, 64)
    )
    assert len(full[1].rollout_share) == len(sparse[1].rollout_share) == 2
    assert full[2].seconds["rollout"].busy == sparse[2].seconds["rollout"].busy
    assert full[2].flops == sparse[2].flops
    # Updates share by samples: 32 of them.
    counts = [len(list(chain.from_iterable(p[1].microbatches()))) for p in (full, sparse)]
    assert counts == [2, 1]


def test_recomputing_takes_less_memory_and_more_time(planned: Any) -> None:
    mode, slow = "--activation_checkpoint.mode", replace(H200, flops=1e9)
    peaks, seconds = [], []
    for value in ("none", "selective", "full"):
        _, simulation, found = planned("wide", "tiny", mode, value, cluster=slow)
        peaks.append(simulation.phases["update"].peak)
        seconds.append(found.seconds["update"].busy)
    assert peaks[0] > peaks[1] > peaks[2]
    assert seconds[0] == seconds[1] < seconds[2]


def test_an_update_of_a_small_model_waits_for_the_host(planned: Any) -> None:
    _, simulation, found = planned("wide", "tiny")
    launches = len(simulation.microbatches()) * simulation.shapes["student"].args.n_layers
    assert found.seconds["update"].busy == pytest.approx(launches * H200.assumed.layer)


# --------------------------------------------------------------- other recipes


def test_without_samples_or_teacher(planned: Any) -> None:
    _, simulation, found = planned("wide", "tiny", *SFT)
    assert list(simulation.phases) == ["update"] and simulation.resident["generator weights"] == 0
    assert found.flops.keys() == {"update"}
    assert found.seconds.keys() == {"update", "optimizer"}


def test_a_reference_is_one_more_frozen_model(planned: Any) -> None:
    _, simulation, found = planned("wide", "tiny", "--reference.coef", 0.5)
    assert simulation.resident["reference weights"] == 2 * rank_share("wide", 8)
    assert found.flops["reference"] == found.flops["update"] / 3
    sent = simulation.phases["reference"].sent["dp_shard"]
    assert sent == simulation.phases["sync"].sent["dp_shard"]


def test_what_is_offloaded_is_not_on_the_device(planned: Any) -> None:
    flags = [f"--{role}.cpu_offload=true" for role in ("teacher", "optimizer")]
    _, plain, _ = planned("wide", "tiny", cluster=TIGHT)
    _, simulation, found = planned("wide", "tiny", *flags, cluster=H200)
    assert simulation.kept.extra == 0 and not simulation.kept.frozen
    for name in ("teacher weights", "student weights", "optimizer state"):
        assert simulation.resident[name] == 0 < plain.resident[name]
    assert simulation.gradients == 0
    moved = sum(plain.resident.values()) - plain.resident["generator weights"]
    saved = plain.phases["teacher"].peak - simulation.phases["teacher"].peak
    assert saved == moved
    assert found.seconds["teacher"].hidden > 0


def test_a_teacher_on_the_host_is_copied_to_be_validated(planned: Any) -> None:
    """Also where one rank has all of it and a copy could have been shared."""
    options = ("--validation.enable", "true", "--teacher.cpu_offload=true")
    _, simulation, _ = planned("tiny", "wide", *options, cluster=replace(H200, world_size=1))
    resident = simulation.resident["student weights"] + simulation.resident["optimizer state"]
    assert simulation.resident["teacher weights"] == 0
    assert simulation.phases["validation"].peak > resident + 2 * rank_share("wide", 1)


def test_tensors_without_data_take_the_implementations_of_the_planned_device() -> None:
    """Those with data, and those of another mode, do not."""
    real = torch.empty(1, 1, 64, dtype=torch.bfloat16)
    with FakeTensorMode():
        other = torch.empty(1, 1, 64, dtype=torch.bfloat16)
    with TensorsWithoutData(Device("cuda")):
        planned = torch.empty(1, 1, 64, dtype=torch.bfloat16)
        half, both = planned + planned, planned.float()
        assert half.dtype == torch.bfloat16 and fused(half) and fused(planned[0])
        assert not fused(both) and fused(both, (torch.float32,))
        assert choose_paged_attention(64, half.dtype, half).name == "triton"
    assert fused(planned) and not fused(real) and not fused(other)
    assert choose_paged_attention(64, real.dtype, real).name == "pages"


@pytest.mark.slow
def test_several_updates_do_not_pile_up_gradients(planned: Any) -> None:
    """Only micro-batches of one update have earlier gradients beside them."""
    budget = "--training.max_tokens_per_microbatch", 128
    _, several, _ = planned("wide", "tiny", *budget)
    _, updates, _ = planned("wide", "tiny", *budget, "--distill.minibatches", 2)
    assert len(several.microbatches("teacher")) == len(updates.microbatches("teacher")) == 2
    assert several.phases["update"].peak > updates.phases["update"].peak


def test_validation_has_the_teachers_copy_in_place_of_the_students(planned: Any) -> None:
    options = ("--validation.enable", "true", "--validation.max_prompts", 8)
    _, simulation, found = planned("tiny", "wide", *options)
    resident = sum(simulation.resident.values()) - simulation.resident["generator weights"]
    assert simulation.phases["validation"].peak > resident + 2 * rank_share("wide", 1)
    assert "validation" not in found.seconds


# ------------------------------------------------------------------- remedies


@pytest.mark.slow
def test_remedies_fit_when_they_are_tried(planned: Any, arguments: Any) -> None:
    tight = ("--training.max_tokens_per_microbatch", 2048, "--rollout.group_size", 16)
    job, simulation, found = planned("wide", "tiny", *tight)
    peaks = [p.peak for p in simulation.phases.values()]
    small = replace(H200, memory=0.6 * max(peaks), reserve=0.0)
    assert not estimate(job, small, simulation).fits

    def again(changed: JobConfig) -> Estimate:
        job = resolved(changed, small)
        return estimate(job, small, simulate(job, small, 32, 32))

    options, better = remedies(job.config, small, again)
    assert options and better.fits
    changed = load_config([*arguments("wide", "tiny", *tight), *" ".join(options).split()])
    assert again(changed) == better


@pytest.mark.slow
def test_no_remedy_for_what_is_hopeless(planned: Any) -> None:
    job, _, _ = planned("wide", "tiny")
    tiny = replace(H200, memory=1e5, reserve=0.0)

    def again(changed: JobConfig) -> Estimate:
        job = resolved(changed, tiny)
        return estimate(job, tiny, simulate(job, tiny, 32, 32))

    options, better = remedies(job.config, tiny, again)
    assert options and better is None


# ----------------------------------------------------------------- the command


def test_plans_are_repeatable_and_leave_nothing(arguments: Any, capsys: Any) -> None:
    argv = [*arguments("tiny", "wide"), "--world-size", "8,64", "--gpu", "H200"]
    outputs = []
    for _ in range(2):
        assert main(argv) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    rows = {line[:34].strip(): line[34:].split() for line in outputs[0].splitlines()}
    assert rows["devices"] == ["8", "64"]
    assert rows["fits"] == ["yes", "yes"]
    assert "Assumed: " in outputs[0]
    assert not dist.is_initialized()


@pytest.mark.slow
def test_what_does_not_fit_is_exit_code_1(arguments: Any, capsys: Any) -> None:
    argv = [*arguments("tiny", "wide"), "--gpu-memory", "0.01", "--reserve", "0.009"]
    assert main(argv) == 1
    out = capsys.readouterr().out
    assert "NO" in out and "On 8, the peak (in " in out


MISTAKES = [
    (["--world-size", "0"], "--world-size: '0'"),
    (["--world-size", "8,x"], "--world-size: 'x'"),
    (["--world-size"], "--world-size: expected one argument"),
    (["--gpu", "nonsense"], "--gpu: the memory of 'nonsense' is not known"),
    (["--gpu-memory", "nan"], "--gpu-memory: 'nan'"),
    (["--prompt-tokens", "33"], "--prompt-tokens: 33 is more than data.max_prompt_tokens = 32"),
    (["--optimizer.lrr", "1"], "did you mean --optimizer.lr?"),
    (["--world-size", "3", *map(str, tp(3))], "3 does not divide num_key_value_heads 8"),
    ([*map(str, tp(3))], "is not the world size 8; what fits: 1 x 8 x 1"),
    (["--teacher.hf_path", "/nowhere"], "teacher.hf_path = '/nowhere'"),
]


@pytest.mark.parametrize(("options", "part"), MISTAKES)
def test_mistakes_are_one_line(arguments: Any, capsys: Any, options: list[str], part: str) -> None:
    assert main([*arguments("tiny", "wide"), *options]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("opd_titan: ") and part in line
    assert not dist.is_initialized()


def test_a_failing_simulation_leaves_no_process_group(planned: Any) -> None:
    with pytest.raises(UserError):
        planned("tiny", "tiny", *tp(5), cluster=replace(H200, world_size=5))
    assert not dist.is_initialized()


@pytest.mark.slow
def test_both_scripts_plan(arguments: Any) -> None:
    outputs = []
    for command in (["plan.sh"], ["run_train.sh", "--plan"]):
        script = [str(REPO / "scripts" / command[0]), *command[1:]]
        done = subprocess.run(
            [*script, *arguments("tiny", "wide"), "--gpu", "B200"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, "")
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] and "178.40" in outputs[0]


# -------------------------------------------------------------- against reality


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's and Linux's accounting of memory")
def test_within_10_percent_of_a_real_run() -> None:
    command = [sys.executable, str(REPO / "benchmarks" / "plan_accuracy.py"), "--only"]
    done = subprocess.run(
        [*command, "fsdp 2, selective"],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
