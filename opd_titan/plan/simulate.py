"""Run one step of a job on tensors without data, as one rank of a fake process group.

Nothing is computed and nothing is sent, so a laptop plans for 512 GPUs in seconds. The code is that
of a run: `join_models`, `Phases`, the generator. Only a few micro-batches and the largest forwards
of the rollout run; their traffic is multiplied by the number of those that they represent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore

from opd_titan.checkpoint.hf_folder import CONFIG
from opd_titan.config.resolve import ResolvedJob, is_teacher
from opd_titan.data.loader import share_out
from opd_titan.data.types import Prompt, Sample, ScoredBy
from opd_titan.distill.packing import Minibatch, cost, taught_by
from opd_titan.distributed.monitor import Monitor, ProgressBar
from opd_titan.distributed.tensor_parallel import local
from opd_titan.distributed.world import World, axes, build_world
from opd_titan.plan.cluster import Cluster
from opd_titan.plan.rollout import PlannedRunner
from opd_titan.plan.tracker import TensorsWithoutData, Tracker, define_collectives
from opd_titan.rollout.generator import Generator
from opd_titan.rollout.memory import StepMemory
from opd_titan.rollout.sampler import SamplingParams
from opd_titan.rollout.scheduler import Request
from opd_titan.training.gathering import Gathering
from opd_titan.training.models import (
    allocate,
    build_generator,
    compute_dtype,
    join_models,
    parallel_model,
)
from opd_titan.training.phases import Phases
from opd_titan.training.sources import ModelShape, inspect_shape

# The size of the validation set if the recipe does not limit it: that of GSM8K.
_VALIDATION_PROMPTS = 1319
_EOS_IDS = {0}
# Without cuDNN: torch would ask the device, which does not exist, whether it supports cuDNN.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class Phase:
    """What one phase of a step costs one rank.

    Attributes:
        peak: the most bytes alive, everything resident included.
        sent: bytes that the rank sends in the whole step, by axis of the mesh.
        collectives: their number in the whole step, by axis.
        operations: of one decoding forward (rollout only).
    """

    peak: int = 0
    sent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    collectives: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    operations: int = 0


@dataclass
class Simulation:
    """One rank's memory in bytes, its phases, and the step's samples.

    Attributes:
        resident: what is there between phases, by name.
        weights: the frozen models' share of one rank, on its device or its host, by role.
        gradients: on the device; `trained` parameters have one in fp32.
        kept: what stays gathered between micro-batches.
        scored: micro-batches of one rank in the whole step, by frozen model.
        kv_cache: bytes of the cache, with its `pages` of `page_size` tokens.
        runner: all that the rollout keeps for the next one, including the cache.
        slots: the most sequences decoded at once.
        decode_forwards, preempted: see `RolloutStats`.
        prefilled: chunks of prefixes that went through prefills, as (start, end).
        samples: of all ranks, with the planned lengths.
        update_share: those that this rank scores and updates on, by micro-batch.
    """

    shapes: dict[str, ModelShape]
    world: World
    dtype: torch.dtype
    samples: list[Sample]
    kept: Gathering = Gathering()
    resident: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    gradients: int = 0
    trained: int = 0
    scored: dict[str, int] = field(default_factory=dict)
    kv_cache: int = 0
    pages: int = 0
    page_size: int = 0
    runner: int = 0
    phases: dict[str, Phase] = field(default_factory=dict)
    slots: int = 0
    decode_forwards: int = 0
    preempted: int = 0
    prefilled: list[tuple[int, int]] = field(default_factory=list)
    update_share: list[list[Sample]] = field(default_factory=list)

    @property
    def rollout_share(self) -> list[Sample]:
        """The samples that this rank draws. No rank draws more."""
        dp = self.world.dp
        return [s for s in self.samples if s.prompt.index % dp.size == dp.rank]

    @property
    def axes(self) -> dict[str, int]:
        """Ranks along each axis of the mesh."""
        return axes(self.world.mesh)


def simulate(
    job: ResolvedJob, cluster: Cluster, prompt_tokens: int, response_tokens: int
) -> Simulation:
    """Run a step's phases as rank 0 of the cluster would.

    Args:
        prompt_tokens, response_tokens: of every sample.

    Raises:
        UserError: the recipe cannot run on so many ranks.
    """
    with _fake_world(job, cluster) as world, ExitStack() as modes:
        shapes = {
            role: inspect_shape(spec, world.tp.size, [CONFIG]) for role, spec in job.models.items()
        }
        samples = _samples(job, prompt_tokens, response_tokens)
        result = Simulation(shapes, world, compute_dtype(job), samples)
        tracker = Tracker(gloo=not cluster.on_cuda)
        # The models are on the meta device as yet.
        step = _Step(job, cluster, result, tracker)
        if cluster.on_cuda:
            modes.enter_context(sdpa_kernel(_ATTENTION))
        modes.enter_context(TensorsWithoutData(cluster.device))
        modes.enter_context(tracker)
        modes.enter_context(tracker.watch())
        step.run()
        return result


@contextmanager
def _fake_world(job: ResolvedJob, cluster: Cluster) -> Iterator[World]:
    define_collectives()
    dist.init_process_group("fake", rank=0, world_size=cluster.world_size, store=FakeStore())
    try:
        layout = job.layout
        yield build_world(torch.device("cpu"), layout.replicate, layout.shard, layout.tensor)
    finally:
        dist.destroy_process_group()


def _samples(job: ResolvedJob, prompt_tokens: int, response_tokens: int) -> list[Sample]:
    r = job.config.rollout
    if r.max_tokens_per_step:
        fair = r.max_tokens_per_step // (r.prompts_per_step * r.group_size)
        response_tokens = min(response_tokens, fair)
    rows = job.data_sets
    shares = share_out([r.prompts_per_step] * len(rows), [row.weight for row in rows])
    return [
        Sample(
            Prompt(i, "", (0,) * prompt_tokens, teacher=rows[number].teacher),
            n,
            [0] * response_tokens,
            "stop",
        )
        for i, number in zip(range(r.prompts_per_step), shares, strict=False)
        for n in range(r.group_size)
    ]


class _Meter:
    """Add up what a tracker sees, by phase.

    Attributes:
        on_host: bytes that the simulation holds, but the cluster's devices would not.
    """

    def __init__(self, tracker: Tracker, world: World) -> None:
        mesh = world.mesh
        self.tracker = tracker
        self.groups = {axis: mesh.get_group(axis).group_name for axis in axes(mesh)}
        self.phases: dict[str, Phase] = {}
        self.on_host = 0

    @property
    def live(self) -> int:
        """Bytes alive on the device."""
        return self.tracker.live - self.on_host

    def note(self, name: str, times: float = 1.0, calls: float | None = None) -> Phase:
        """Add what was done since the last note to a phase, and return the phase.

        Args:
            times: how often it is done in the whole step.
            calls: how often its collectives are called, if not as often.
        """
        tracker, phase = self.tracker, self.phases.setdefault(name, Phase())
        phase.peak = max(phase.peak, tracker.peak - self.on_host)
        for axis, group in self.groups.items():
            phase.sent[axis] += tracker.sent[group] * times
            phase.collectives[axis] += tracker.collectives[group] * (
                times if calls is None else calls
            )
        tracker.reset()
        return phase


class _PlannedMemory(StepMemory):
    """The memory of the cluster's devices, not of the machine that runs the planner."""

    def __init__(self, cluster: Cluster, meter: _Meter) -> None:
        super().__init__(torch.device("cpu"))
        self.cluster, self.meter = cluster, meter

    def total_bytes(self) -> int:
        return int(self.cluster.memory)

    def free_bytes(self) -> int:
        return max(0, int(self.cluster.memory - self.meter.live - self.cluster.reserve))

    def never_used_bytes(self) -> int:
        return self.free_bytes()


class _PassMonitor(Monitor):
    """Note each pass over a micro-batch of a phase.

    Attributes:
        pass_done: called after each.
    """

    def __init__(self) -> None:
        self.pass_done: Callable[[], object] = lambda: None

    def on_sequences(self, bar: ProgressBar, stops: int | None = None) -> Callable[[int], None]:
        return lambda sequences: self.pass_done() and None


class _Step:
    """The phases in the order of the trainer's step."""

    def __init__(
        self, job: ResolvedJob, cluster: Cluster, result: Simulation, tracker: Tracker
    ) -> None:
        self.config, self.cluster, self.result = job.config, cluster, result
        self.world, self.tracker = result.world, tracker
        self.meter = _Meter(tracker, result.world)
        result.phases = self.meter.phases
        self.memory = _PlannedMemory(cluster, self.meter)
        self.monitor = _PassMonitor()
        self.response_tokens = len(result.samples[0].response_ids)
        mode = self.config.activation_checkpoint.mode
        # Compiled code is not traced here. It keeps about what selective checkpointing keeps.
        if job.compiled and mode == "none":
            mode = "selective"
        self.built = {
            role: parallel_model(shape, self.world, result.dtype, mode, False)
            for role, shape in result.shapes.items()
        }
        compile_off = replace(self.config, compile=replace(self.config.compile, enable="off"))
        self.job = replace(job, config=compile_off)

    def run(self) -> None:
        self._load()
        models, sampled = self.models, self.job.on_policy
        if sampled:
            models.weights.sync()
            self.meter.note("sync")
            self._rollout()
            models.memory.make_room(models.weights, models.generator)
        if self.job.validation_sets:
            self._validate()
        models.memory.make_room(models.weights, models.generator)
        if sampled:
            for sample in self.result.samples:
                sample.student_logprobs = torch.zeros(len(sample.response_ids))
        plan = self.phases.plan(self.result.samples)
        self.result.update_share = list(chain.from_iterable(m.microbatches for m in plan))
        for role in self.job.teachers:
            self._score(role, "teacher", taught_by(role, plan))
        if "reference" in models.frozen:
            self._score("reference", "reference", plan)
        self._update(plan)

    # ----------------------------------------------------------------- loading

    def _load(self) -> None:
        result, tracker = self.result, self.tracker
        for role, model in self.built.items():
            before = tracker.live
            allocate(model, self.world.device)
            for parameter in model.parameters():
                tracker.add(local(parameter))
            result.weights[role] = tracker.live - before
            self._hold(f"{role} weights", tracker.live - before, role)
        self.models = join_models(
            self.job, result.shapes, self.built, _EOS_IDS, self.world, self.memory, self._runner
        )
        self.phases = Phases(self.job, self.world, self.models, self.monitor, bars=False)
        result.kept = self.models.kept
        before = tracker.live
        self._make_gradients()
        result.gradients = tracker.live - before
        result.trained = result.gradients // 4
        self.models.optimizer.step()  # makes its state
        self.models.optimizer.zero_grad(set_to_none=True)
        self._hold("optimizer state", tracker.live - before, "student")
        copied = self.job.on_policy or self.config.validation.enable
        result.resident["generator weights"] = self.models.weights.num_bytes if copied else 0
        tracker.reset()

    def _make_gradients(self) -> None:
        for parameter in self.models.student.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def _is_on_host(self, role: str) -> bool:
        return self.cluster.on_cuda and self.job.models[role].cpu_offload

    def _hold(self, name: str, size: int, role: str) -> None:
        """Note what stays, unless the recipe keeps it on the host."""
        if self._is_on_host(role):
            self.meter.on_host += size
            size = 0
        self.result.resident[name] = size

    # ---------------------------------------------------------------- sampling

    def _runner(self, *args: Any) -> PlannedRunner:
        self.runner = PlannedRunner(*args, response_tokens=self.response_tokens)
        return self.runner

    @torch.no_grad()
    def _rollout(self) -> None:
        result, generator = self.result, self.models.generator
        requests = [Request(s.prompt, s.sample_index, 0) for s in result.rollout_share]
        before = self.tracker.live
        self._sample("rollout", generator, requests, self.phases.sampling)
        runner = self.runner
        result.runner = self.tracker.live - before if runner.static else 0
        result.kv_cache, result.page_size = runner.cache.num_bytes, runner.cache.page_size
        result.slots, result.pages = runner.slots, runner.cache.num_pages
        result.decode_forwards = generator.stats.decode_forwards
        result.preempted = generator.stats.preempted
        result.prefilled = runner.chunks
        del self.runner

    @torch.no_grad()
    def _validate(self) -> None:
        """Simulate the validation at step 0, of the largest teacher if one is measured."""
        v, r, models = self.config.validation, self.config.rollout, self.models
        prompts = v.max_prompts or _VALIDATION_PROMPTS
        mine = -(-prompts // self.world.dp.size)
        prompt = self.result.samples[0].prompt
        requests = [
            Request(replace(prompt, index=i), n, 0)
            for i in range(mine)
            for n in range(v.samples_per_prompt)
        ]
        weights, generator = models.weights, models.generator
        asked = {s.teacher for s in self.job.validation_sets} & models.frozen.keys()
        if asked:
            largest = max(sorted(asked), key=self.result.weights.__getitem__)
            shape, model = self.result.shapes[largest], models.frozen[largest]
            weights, generator = build_generator(
                self.job, shape, model, _EOS_IDS, self.world, self.memory, self._runner
            )
        self.tracker.reset()
        weights.sync()
        self.meter.note("validation", times=0)
        params = SamplingParams(v.max_new_tokens or r.max_new_tokens, v.temperature)
        self.response_tokens = params.max_new_tokens
        self._sample("validation", generator, requests, params, steps=0)
        del self.runner

    def _sample(
        self,
        name: str,
        generator: Generator,
        requests: list[Request],
        params: SamplingParams,
        steps: int = 1,
    ) -> None:
        """Run the largest decoding step and the largest prefill of a rollout.

        Args:
            steps: how often there is such a rollout in a step.
        """
        tracker, meter = self.tracker, self.meter
        generator.generate(requests, params)
        tracker.reset()
        runner = self.runner
        rows = runner.run_decode()
        operations, needed = tracker.operations, tracker.peak - tracker.live
        phase = meter.note(name, steps * runner.num_rows / rows, steps * runner.num_decodes)
        phase.operations = operations
        if runner.static:
            # What a step needs in addition stays with its graphs.
            runner.graph_memory = torch.empty(needed, dtype=torch.uint8)
        tokens = max(1, runner.run_prefill())
        meter.note(name, steps * runner.num_prefilled / tokens, steps * runner.num_prefills)

    # ------------------------------------------------------- scores and update

    def _passes(self, name: str, times: list[float]) -> None:
        """Begin a phase, and note each of its passes with how often it is done."""
        self.tracker.reset()
        left = iter(times)
        self.monitor.pass_done = lambda: self.meter.note(name, next(left))

    def _score(self, role: str, name: ScoredBy, plan: list[Minibatch]) -> None:
        """Run two micro-batches: the first gathers what stays gathered for the others."""
        largest, count = _largest_microbatch(plan)
        if not count:
            return
        self.result.scored[role] = count
        self._passes(name, [1, count - 1])
        passes = min(count, 2)
        self.phases.score(role, [Minibatch([largest] * passes, 1, [role] * passes)])
        self.meter.note(name)
        if self.phases.rule.needs_vocabulary:
            self._keep_hidden(role, name, plan)

    def _keep_hidden(self, role: str, name: ScoredBy, plan: list[Minibatch]) -> None:
        """Allocate the hidden states of the micro-batches that were not run."""
        width = self.result.shapes[role].args.dim
        for sample in chain.from_iterable(m for part in plan for m in part.microbatches):
            if (sample.teacher_hidden if name == "teacher" else sample.reference_hidden) is None:
                tokens = len(sample.response_ids)
                sample.set_hidden(name, torch.empty(tokens, width, dtype=self.result.dtype))

    def _update(self, plan: list[Minibatch]) -> None:
        """Run the first micro-batch of an update, one in the middle, and the last."""
        if self._is_on_host("student"):
            self._make_gradients()
            self.meter.on_host += self.result.gradients
            self.result.gradients = 0
        largest, count = _largest_microbatch(plan)
        updates = len(plan)
        firsts = min(updates, count - updates)
        times = [firsts, count - updates - firsts, updates]
        passes = [float(n) for n in times if n]
        teacher = largest[0].prompt.teacher if largest else ""
        self._passes("update", passes)
        self.phases.update([Minibatch([largest] * len(passes), 1, [teacher] * len(passes))], 0.0)
        self.meter.note("update", updates)


def _largest_microbatch(plan: list[Minibatch]) -> tuple[list[Sample], int]:
    """Return the most costly micro-batch, and the number of micro-batches."""
    microbatches = [m for minibatch in plan for m in minibatch.microbatches]
    return max(microbatches, key=cost, default=[]), len(microbatches)
