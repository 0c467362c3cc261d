"""One step of a job on tensors without data: the program's own code, on one rank of a fake world.

Nothing is computed and nothing is sent, so a plan for 512 GPUs takes a laptop and seconds; but the
model, its sharding, the head, the optimizer, the KV cache and the packing are those of the run.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from opd_titan.build import ModelShape, cpu_offload, inspect_shape, parallel_model, roles
from opd_titan.checkpoint.hf_folder import resolve_model_folder
from opd_titan.config import JobConfig
from opd_titan.data.types import Prompt, Sample
from opd_titan.distill.objectives import OBJECTIVES, ObjectiveSettings
from opd_titan.distill.packing import Minibatch, plan_minibatches
from opd_titan.distill.scoring import score
from opd_titan.distill.update import UpdateRule, forward_backward
from opd_titan.distributed.world import World, build_world
from opd_titan.models.logits import Distribution
from opd_titan.optim import build_optimizer
from opd_titan.plan.cluster import Cluster
from opd_titan.plan.kernels import know_collectives, like_cuda
from opd_titan.plan.tracker import Tracker
from opd_titan.rollout.generator import Generator, SamplingParams, SlotState
from opd_titan.rollout.kv_cache import KVCache
from opd_titan.rollout.scheduler import Request, Scheduler
from opd_titan.rollout.weights import GeneratorWeights

# Where the recipe does not limit the validation, its set is taken to be as large as GSM8K's.
_VALIDATION_PROMPTS = 1319


@dataclass
class Phase:
    """What one phase of a step costs one rank.

    Attributes:
        peak: bytes alive at the worst moment, everything resident included.
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
        microbatches: of one rank in the whole step.
        slots: sequences decoded at once; `waves` of them make the rollout.
        samples: of all ranks, with the lengths that were planned for.
        update_share: those that this rank scores and updates on.
    """

    shapes: dict[str, ModelShape]
    world: World
    dtype: torch.dtype
    resident: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    gradients: int = 0
    trained: int = 0
    microbatches: int = 0
    kv_cache: int = 0
    phases: dict[str, Phase] = field(default_factory=dict)
    slots: int = 0
    waves: int = 0
    samples: list[Sample] = field(default_factory=list)
    update_share: list[Sample] = field(default_factory=list)

    @property
    def rollout_share(self) -> list[Sample]:
        """The samples that this rank draws. No rank draws more."""
        dp = self.world.dp
        return [s for s in self.samples if s.prompt.index % dp.size == dp.rank]

    @property
    def axes(self) -> dict[str, int]:
        """Ranks along each axis of the mesh."""
        mesh = self.world.mesh
        return dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))


def simulate(
    config: JobConfig, cluster: Cluster, prompt_tokens: int, response_tokens: int
) -> Simulation:
    """Run a step's phases as rank 0 of the cluster would.

    Args:
        prompt_tokens, response_tokens: of every sample.

    Raises:
        UserError: the recipe cannot run on so many ranks.
    """
    know_collectives()
    dist.init_process_group("fake", rank=0, world_size=cluster.world_size, store=FakeStore())
    try:
        p = config.parallelism
        world = build_world(
            torch.device("cpu"),
            p.data_parallel_replicate_degree,
            p.data_parallel_shard_degree,
            p.tensor_parallel_degree,
        )
        tp = p.tensor_parallel_degree
        shapes = {role: _shape(role, path, tp) for role, path, _ in roles(config)}
        result = Simulation(shapes, world, _dtype(config, cluster))
        result.samples = _samples(config, prompt_tokens, response_tokens)
        step = _Step(config, cluster, result)
        kernels = like_cuda() if cluster.on_cuda else nullcontext()
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with kernels, fake, step.tracker, step.tracker.watch():
            step.run()
        return result
    finally:
        dist.destroy_process_group()


def _shape(role: str, path: str, tensor_parallel: int) -> ModelShape:
    folder = resolve_model_folder(path, f"{role}.hf_path", ["config.json"])
    return inspect_shape(role, str(folder), tensor_parallel)


def _dtype(config: JobConfig, cluster: Cluster) -> torch.dtype:
    name = config.training.dtype
    if name == "auto":
        name = "bfloat16" if cluster.on_cuda else "float32"
    return getattr(torch, name)


def _samples(config: JobConfig, prompt_tokens: int, response_tokens: int) -> list[Sample]:
    r = config.rollout
    return [
        Sample(Prompt(i, "", (0,) * prompt_tokens), n, [0] * response_tokens, "stop")
        for i in range(r.prompts_per_step)
        for n in range(r.group_size)
    ]


class _PlannedGenerator(Generator):
    """Counts on the memory of the cluster, not on that of the machine that plans."""

    budget: int = 0

    def free_bytes(self) -> int:
        return max(0, self.budget)


class _CopiedWeights(GeneratorWeights):
    """Of a model on the host, which shares no storage with a generator on the GPU."""

    def _own_storage(self, parameter: torch.Tensor) -> None:
        return None


class _Step:
    """The phases in the order of the trainer's step."""

    def __init__(self, config: JobConfig, cluster: Cluster, result: Simulation) -> None:
        self.config, self.cluster, self.result = config, cluster, result
        self.world, self.dtype = result.world, result.dtype
        self.tracker = Tracker(gloo=not cluster.on_cuda)
        self.on_host = 0  # bytes that the plan holds, but the cluster's devices would not
        built_as = copy.deepcopy(config)
        # Compiled code is not traced here; it keeps about what selective checkpointing does.
        if config.compile.enable and config.activation_checkpoint.mode == "none":
            built_as.activation_checkpoint.mode = "selective"
        built_as.compile.enable = False
        self.models = {
            role: parallel_model(shape, self.world, built_as, self.dtype)
            for role, shape in result.shapes.items()
        }

    def run(self) -> None:
        self._load()
        if self.config.rollout.on_policy_fraction > 0.0:
            with self._phase("sync"):
                self.weights.sync()
            self._rollout()
        if self.config.validation.enable:
            self._validate()
        self.weights.release()
        plan = self._plan()
        for role in ("teacher", "reference"):
            if role in self.models:
                self._score(role, plan)
        self._update(plan)

    def _load(self) -> None:
        for role, model in self.models.items():
            before = self.tracker.live
            for parameter in model.to_empty(device="cpu").parameters():
                self.tracker.add(parameter.to_local())
            self.result.weights[role] = self.tracker.live - before
            self._hold(f"{role} weights", self.tracker.live - before, role)
        self.student = self.models["student"]
        self.optimizer = build_optimizer(self.student, self.config)
        before = self.tracker.live
        self._make_gradients()
        self.result.gradients = self.tracker.live - before
        self.result.trained = self.result.gradients // 4
        self.optimizer.step()  # makes its state
        self.optimizer.zero_grad(set_to_none=True)
        self._hold("optimizer state", self.tracker.live - before, "student")
        before = self.tracker.live
        self.weights = self._generator_weights("student")
        sampled = self.config.rollout.on_policy_fraction > 0.0 or self.config.validation.enable
        self._hold("generator weights", self.weights.num_bytes if sampled else 0)

    def _make_gradients(self) -> None:
        for parameter in self.student.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def _generator_weights(self, role: str) -> GeneratorWeights:
        build = partial(self.result.shapes[role].build_share, self.world.tp, False)
        kind = _CopiedWeights if self._is_on_host(role) else GeneratorWeights
        return kind(self.models[role], build, self.dtype, self.world.device)

    def _is_on_host(self, role: str) -> bool:
        return self.cluster.on_cuda and cpu_offload(role, self.config)

    def _hold(self, name: str, size: int, role: str | None = None) -> None:
        """Note what stays, unless the recipe keeps it on the host."""
        if role is not None and self._is_on_host(role):
            self.on_host += size
            size = 0
        self.result.resident[name] = size

    @contextmanager
    def _phase(self, name: str, times: float = 1.0) -> Iterator[Phase]:
        """Note a phase's peak and traffic. The body stands for a share of it, done `times`."""
        tracker, phase = self.tracker, self.result.phases.setdefault(name, Phase())
        tracker.reset()
        yield phase
        phase.peak = max(phase.peak, tracker.peak - self.on_host)
        mesh = self.world.mesh
        for axis in mesh.mesh_dim_names:
            group = mesh.get_group(axis).group_name
            phase.sent[axis] += tracker.sent[group] * times
            phase.collectives[axis] += tracker.collectives[group] * times

    def _generator(self, weights: GeneratorWeights) -> _PlannedGenerator:
        c = self.config
        budget = c.training.max_tokens_per_microbatch
        concurrent, tp = c.rollout.max_concurrent, self.world.tp
        generator = _PlannedGenerator(weights.model, {0}, concurrent, budget, tp)
        spent = self.tracker.live - self.on_host + self.cluster.reserve
        generator.budget = int(self.cluster.memory - spent)
        return generator

    @torch.no_grad()
    def _rollout(self) -> None:
        r = self.config.rollout
        mine = self.result.rollout_share
        requests = [Request(s.prompt, s.sample_index, 0) for s in mine]
        generator = self._generator(self.weights)
        params = SamplingParams(r.max_new_tokens, r.temperature, r.top_p, r.top_k)
        # The cache has room for the longest response, whatever the mean is.
        longest = len(mine[0].prompt.token_ids) + r.max_new_tokens
        scheduler = Scheduler(requests, generator.count_slots(len(requests), longest))
        self.result.slots = scheduler.slots
        self.result.waves = -(-len(requests) // scheduler.slots)
        self._sample(generator, scheduler, params, longest)

    @torch.no_grad()
    def _validate(self) -> None:
        """Before step 1 the teacher answers too, from a copy in place of the student's."""
        v, r = self.config.validation, self.config.rollout
        prompts = v.max_prompts or _VALIDATION_PROMPTS
        mine = -(-prompts // self.world.dp.size) * v.samples_per_prompt
        prompt = self.result.samples[0].prompt
        requests = [Request(prompt, n, 0) for n in range(mine)]
        with self._phase("validation", 0):
            weights = self.weights
            if "teacher" in self.models:
                self.weights.release()
                weights = self._generator_weights("teacher")
            weights.sync()
            generator = self._generator(weights)
            params = SamplingParams(v.max_new_tokens or r.max_new_tokens, v.temperature)
            longest = len(prompt.token_ids) + params.max_new_tokens
            slots = generator.count_slots(mine, longest)
            args = generator.model.args
            cache = KVCache(args, slots, longest, self.dtype, self.world.device)
            state = SlotState(slots, params.max_new_tokens, generator.eos_N)
            state.start(0, requests[:slots])
            state.longest = longest - 1
            hidden_ND = generator.decode(cache, state, slots)
            generator.choose(hidden_ND, state, slice(0, slots), params)

    def _sample(
        self, generator: Generator, scheduler: Scheduler, params: SamplingParams, longest: int
    ) -> None:
        """Prefills until every slot is taken, then one forward of decoding at the longest."""
        before = self.tracker.live
        args, tokens = generator.model.args, len(self.result.samples[0].response_ids)
        cache = KVCache(args, scheduler.slots, longest, self.dtype, self.world.device)
        self.result.kv_cache = self.tracker.live - before
        state = SlotState(scheduler.slots, params.max_new_tokens, generator.eos_N)
        with self._phase("rollout", self.result.waves):
            while admitted := scheduler.admit(generator.max_prefill_tokens):
                first = len(scheduler.running) - len(admitted)
                state.start(first, admitted)
                hidden_ND = generator.prefill(cache, first, admitted)
                rows = slice(first, len(scheduler.running))
                state.append(rows, *generator.choose(hidden_ND, state, rows, params))
        state.longest = longest - 1
        with self._phase("rollout", self.result.waves * (tokens - 1)) as phase:
            operations = self.tracker.operations
            hidden_ND = generator.decode(cache, state, scheduler.slots)
            rows = slice(0, scheduler.slots)
            state.append(rows, *generator.choose(hidden_ND, state, rows, params))
            phase.operations = self.tracker.operations - operations

    def _plan(self) -> list[Minibatch]:
        c, result = self.config, self.result
        budget = c.training.max_tokens_per_microbatch
        plan = plan_minibatches(result.samples, c.distill.minibatches, budget, self.world.dp)
        result.update_share = [s for m in plan for samples in m.microbatches for s in samples]
        if c.rollout.on_policy_fraction > 0.0:
            for s in result.update_share:
                s.student_logprobs = torch.zeros(len(s.response_ids))
        return plan

    def _score(self, role: str, plan: list[Minibatch]) -> None:
        first, count = _first_microbatch(plan)
        with self._phase(role, count):
            scored = score(
                self.models[role],
                [Minibatch([first], 1)],
                Distribution(self.config.rollout.temperature),
                self.world,
            )
        for sample, logprobs in scored:
            setattr(sample, f"{role}_logprobs", logprobs)

    def _update(self, plan: list[Minibatch]) -> None:
        c, r = self.config, self.config.rollout
        d = c.distill
        settings = ObjectiveSettings(reference_coef=c.reference.coef, true_ratio=d.minibatches > 1)
        dist_ = Distribution(r.temperature, r.top_k, r.top_p)
        rule = UpdateRule(OBJECTIVES[d.objective], settings, dist_, c.training.max_grad_norm)
        first, count = _first_microbatch(plan)
        self.result.microbatches = count
        offloaded = self._is_on_host("student")
        # All micro-batches of an update but the first have its gradients beside them.
        if offloaded or any(len(m.microbatches) > 1 for m in plan):
            self._make_gradients()
        if offloaded:
            self.on_host += self.result.gradients
            self.result.gradients = 0
        with self._phase("update", count):
            forward_backward(self.student, first, 1, rule, self.world)
        with self._phase("update", len(plan)):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def _first_microbatch(plan: list[Minibatch]) -> tuple[list[Sample], int]:
    """The fullest one stands for all of them, and how many there are."""
    microbatches = [m for minibatch in plan for m in minibatch.microbatches]
    return max(microbatches, key=lambda m: sum(s.num_tokens for s in m)), len(microbatches)
