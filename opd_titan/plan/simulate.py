"""Run one step of a job on tensors without data, as one rank of a fake process group.

Nothing is computed and nothing is sent, so a laptop plans for 512 GPUs in seconds. The simulation
calls the code of a run: `join_models`, `Phases`, the generator. It runs only a few micro-batches
and the largest forwards of the rollout, and multiplies their traffic by the number of forwards that
they represent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from opd_titan.distill.packing import Minibatch, cost, minibatches_of
from opd_titan.distributed.monitor import Monitor, ProgressBar
from opd_titan.distributed.tensor_parallel import local
from opd_titan.distributed.world import World, axes, build_world
from opd_titan.plan.cluster import Cluster
from opd_titan.plan.rollout import PlannedRunner
from opd_titan.plan.tracker import Phase, TensorsWithoutData, Tracker, define_collectives
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

# The size of the validation set if the recipe does not limit it: the size of GSM8K's test set.
_VALIDATION_PROMPTS = 1319
_EOS_IDS = {0}
# Phases in which a model samples.
SAMPLING = ("sync", "rollout", "validation")
# Without cuDNN: torch would ask the device, which does not exist, whether it supports cuDNN.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class RolloutFigures:
    """The sizes of one rank's rollout.

    Attributes:
        slots: the most sequences decoded at once.
        kv_cache: bytes of the cache, with its `pages` of `page_size` tokens.
        kept: bytes that can stay for the next rollout, including the cache; 0 without graphs.
        decode_forwards, preempted: see `RolloutStats`.
        prefilled: chunks of prefixes that went through prefills, as (start, end).
    """

    slots: int = 0
    kv_cache: int = 0
    pages: int = 0
    page_size: int = 0
    kept: int = 0
    decode_forwards: int = 0
    preempted: int = 0
    prefilled: Sequence[tuple[int, int]] = ()


@dataclass
class Simulation:
    """One rank's memory in bytes, its phases, and the step's samples.

    Attributes:
        shapes: by role.
        samples: of all ranks, with the planned lengths.
        kept: what stays gathered between micro-batches.
        weights: bytes of one rank's share of each model, by role, on its device or its host.
        resident: bytes on the device between phases, by name.
        stays: the generator's copy and its cache stay in use during the update.
        plan: this rank's share of the updates.
    """

    shapes: dict[str, ModelShape]
    world: World
    samples: list[Sample]
    kept: Gathering = Gathering()
    weights: dict[str, int] = field(default_factory=dict)
    resident: dict[str, int] = field(default_factory=dict)
    phases: dict[str, Phase] = field(default_factory=dict)
    rollout: RolloutFigures = RolloutFigures()
    stays: bool = False
    plan: list[Minibatch] = field(default_factory=list)

    @property
    def gradients(self) -> int:
        """Bytes of the gradients on the device: fp32, as the student's weights."""
        return self.resident["student weights"]

    def microbatches(self, role: str = "student") -> list[list[Sample]]:
        """Return the micro-batches of this rank that a model sees."""
        plan = minibatches_of(role, self.plan) if is_teacher(role) else self.plan
        return [samples for minibatch in plan for samples in minibatch.microbatches]

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
        prompt_tokens, response_tokens: the lengths of every sample.

    Raises:
        UserError: the recipe cannot run on so many ranks.
    """
    with _fake_world(job, cluster) as world, ExitStack() as modes:
        shapes = {
            role: inspect_shape(spec, world.tp.size, [CONFIG]) for role, spec in job.models.items()
        }
        samples = _samples(job, prompt_tokens, response_tokens)
        tracker = Tracker(world.mesh, gloo=not cluster.on_cuda)
        result = Simulation(shapes, world, samples, phases=tracker.phases)
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


class _PlannedMemory(StepMemory):
    """The memory of the cluster's devices, not of the machine that runs the planner."""

    def __init__(self, cluster: Cluster, tracker: Tracker) -> None:
        super().__init__(torch.device("cpu"))
        self.cluster, self.tracker = cluster, tracker

    def total_bytes(self) -> int:
        return int(self.cluster.memory)

    def free_bytes(self) -> int:
        on_device = self.tracker.live - self.tracker.on_host
        return max(0, int(self.cluster.memory - on_device - self.cluster.reserve))

    def never_used_bytes(self) -> int:
        peaks = [p.peak for name, p in self.tracker.phases.items() if name not in SAMPLING]
        return int(self.cluster.memory - self.cluster.held(max(peaks)))


class _PassMonitor(Monitor):
    """Call a function after each micro-batch of a phase.

    Attributes:
        pass_done: the function.
    """

    def __init__(self) -> None:
        self.pass_done: Callable[[], None] = lambda: None

    def on_sequences(self, bar: ProgressBar, stops: int | None = None) -> Callable[[int], None]:
        return lambda sequences: self.pass_done()


class _Step:
    """The phases in the order of the trainer's step.

    The constructor builds the models on the meta device. `run` needs `TensorsWithoutData`.
    """

    def __init__(
        self, job: ResolvedJob, cluster: Cluster, result: Simulation, tracker: Tracker
    ) -> None:
        self.config, self.cluster, self.result = job.config, cluster, result
        self.world, self.tracker = result.world, tracker
        self.monitor = _PassMonitor()
        self.response_tokens = len(result.samples[0].response_ids)
        mode = self.config.activation_checkpoint.mode
        # Compiled code is not traced here. It keeps about as much as selective checkpointing.
        if job.compiled and mode == "none":
            mode = "selective"
        self.built = {
            role: parallel_model(shape, self.world, compute_dtype(job), mode, False)
            for role, shape in result.shapes.items()
        }
        not_compiled = replace(self.config, compile=replace(self.config.compile, enable="off"))
        self.job = replace(job, config=not_compiled)

    def run(self) -> None:
        self._load()
        models, result = self.models, self.result
        memory, holders = models.memory, (models.weights, models.generator)
        if self.job.on_policy:
            models.weights.sync()
            self.tracker.note("sync")
            self._rollout()
            memory.make_room(*holders)
        if self.job.validation_sets:
            self._validate()
            memory.make_room(*holders)
        if self.job.on_policy:
            for sample in result.samples:
                sample.student_logprobs = torch.zeros(len(sample.response_ids))
        result.plan = self.phases.plan(result.samples)
        for role in models.frozen:
            self._score(role)
        self._update()
        memory.measure(most=models.kept.usable - models.kept.needed)
        held = result.resident["generator weights"] + result.rollout.kept
        result.stays = 0 < held <= (memory.room or 0)

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
            self.job,
            result.shapes,
            self.built,
            _EOS_IDS,
            self.world,
            _PlannedMemory(self.cluster, tracker),
            self._make_runner,
        )
        self.phases = Phases(self.job, self.world, self.models, self.monitor, bars=False)
        result.kept = self.models.kept
        before = tracker.live
        self._make_gradients()
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
        """Record the memory that a model keeps, on the device or on the host."""
        if self._is_on_host(role):
            self.tracker.on_host += size
            size = 0
        self.result.resident[name] = size

    # ---------------------------------------------------------------- sampling

    def _make_runner(self, *args: Any) -> PlannedRunner:
        self.runner = PlannedRunner(*args, response_tokens=self.response_tokens)
        return self.runner

    @torch.no_grad()
    def _rollout(self) -> None:
        result, generator = self.result, self.models.generator
        requests = [Request(s.prompt, s.sample_index, 0) for s in result.rollout_share]
        before = self.tracker.live
        self._sample("rollout", generator, requests, self.phases.sampling)
        runner, stats = self.runner, generator.stats
        result.rollout = RolloutFigures(
            slots=runner.slots,
            kv_cache=runner.cache.num_bytes,
            pages=runner.cache.num_pages,
            page_size=runner.cache.page_size,
            kept=self.tracker.live - before if runner.static else 0,
            decode_forwards=stats.decode_forwards,
            preempted=stats.preempted,
            prefilled=runner.chunks,
        )
        del self.runner

    @torch.no_grad()
    def _validate(self) -> None:
        """Simulate the validation at step 0, of the largest teacher if one is measured."""
        v, r, models = self.config.validation, self.config.rollout, self.models
        mine = -(-(v.max_prompts or _VALIDATION_PROMPTS) // self.world.dp.size)
        prompt = self.result.samples[0].prompt
        requests = [
            Request(replace(prompt, index=i), n, 0)
            for i in range(mine)
            for n in range(v.samples_per_prompt)
        ]
        weights, generator = models.weights, models.generator
        measured = {s.teacher for s in self.job.validation_sets} & models.frozen.keys()
        if measured:
            role = max(sorted(measured), key=self.result.weights.__getitem__)
            weights, generator = build_generator(
                self.job,
                self.result.shapes[role],
                models.frozen[role],
                _EOS_IDS,
                self.world,
                models.memory,
                self._make_runner,
            )
        self.tracker.reset()
        weights.sync()
        self.tracker.note("validation", times=0)
        params = SamplingParams(v.max_new_tokens or r.max_new_tokens, v.temperature)
        self.response_tokens = params.max_new_tokens
        self._sample("validation", generator, requests, params, times=0)
        del self.runner

    def _sample(
        self,
        name: str,
        generator: Generator,
        requests: list[Request],
        params: SamplingParams,
        times: int = 1,
    ) -> None:
        """Record the largest decoding step and prefill of a rollout, in place of all of them.

        Args:
            times: how often a step has such a rollout.
        """
        tracker = self.tracker
        generator.generate(requests, params)
        runner = self.runner
        tracker.reset()
        rows = runner.run_decode()
        operations, needed = tracker.operations, tracker.peak - tracker.live
        tracker.note(name, times * runner.num_rows / rows, times * runner.num_decodes)
        tracker.phases[name].operations = operations
        if runner.static:
            # The graphs keep the additional memory of a step.
            runner.graph_memory = torch.empty(needed, dtype=torch.uint8)
        tokens = max(1, runner.run_prefill())
        tracker.note(name, times * runner.num_prefilled / tokens, times * runner.num_prefills)

    # ------------------------------------------------------- scores and update

    def _begin(self, name: str, times: list[int]) -> None:
        """Begin a phase. A step has `times[i]` passes like pass i of the simulation."""
        left = iter(times)
        self.monitor.pass_done = lambda: self.tracker.note(name, next(left))
        self.tracker.reset()

    def _score(self, role: str) -> None:
        """Run two micro-batches: the first one gathers the weights that stay gathered."""
        microbatches = self.result.microbatches(role)
        if not microbatches:
            return
        name: ScoredBy = "teacher" if is_teacher(role) else "reference"
        largest, passes = max(microbatches, key=cost), min(2, len(microbatches))
        self._begin(name, [1, len(microbatches) - 1])
        self.phases.score(role, [Minibatch([largest] * passes, 1, [role] * passes)])
        self.tracker.note(name)
        if self.phases.rule.needs_vocabulary:  # the hidden states of all others are kept too
            width, dtype = self.result.shapes[role].args.dim, compute_dtype(self.job)
            for sample in chain.from_iterable(microbatches):
                tokens = len(sample.response_ids)
                sample.set_hidden(name, torch.empty(tokens, width, dtype=dtype))

    def _update(self) -> None:
        """Run one update of up to three micro-batches: the first, one in the middle, the last."""
        if self._is_on_host("student"):
            self._make_gradients()
            self.tracker.on_host += self.result.weights["student"]
        microbatches, updates = self.result.microbatches(), len(self.result.plan)
        largest = max(microbatches, key=cost)
        first = min(updates, len(microbatches) - updates)
        times = [n for n in (first, len(microbatches) - updates - first, updates) if n]
        teacher = largest[0].prompt.teacher if largest else ""
        self._begin("update", times)
        self.phases.update([Minibatch([largest] * len(times), 1, [teacher] * len(times))], rate=0.0)
        self.tracker.note("update", updates)
