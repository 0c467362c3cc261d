"""Run one step of a job on tensors without data, as one rank of a fake process group.

Nothing is computed and nothing is sent, so a laptop plans for 512 GPUs in seconds. The code of the
model, its sharding, the head, the optimizer, the KV cache and the packing is that of the run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from opd_titan.checkpoint.hf_folder import CONFIG
from opd_titan.config.resolve import ResolvedJob, is_teacher
from opd_titan.data.loader import share_out
from opd_titan.data.types import Prompt, Sample
from opd_titan.distill.optim import build_optimizer
from opd_titan.distill.packing import Minibatch, cost, plan_minibatches, taught_by
from opd_titan.distill.scoring import gathered_heads, score
from opd_titan.distill.update import UpdateRule, forward_backward, models_of
from opd_titan.distributed.sharding import exchange_gradients, resharding
from opd_titan.distributed.tensor_parallel import local
from opd_titan.distributed.world import World, axes, build_world
from opd_titan.models.logits import Distribution
from opd_titan.plan.cluster import Cluster
from opd_titan.plan.kernels import know_collectives, like_cuda
from opd_titan.plan.rollout import PlannedGenerator, PlannedRunner
from opd_titan.plan.tracker import Tracker
from opd_titan.rollout.sampler import SamplingParams
from opd_titan.rollout.scheduler import Request
from opd_titan.rollout.weights import GeneratorWeights
from opd_titan.training.gathering import Gathering, choose
from opd_titan.training.models import allocate, compute_dtype, parallel_model
from opd_titan.training.sources import ModelShape, common_vocab_size, inspect_shape

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
        times, calls: how much of the phase the body now run stands for: what it sends, and how
            often its collectives are called.
    """

    peak: int = 0
    sent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    collectives: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    operations: int = 0
    times: float = 1.0
    calls: float = 1.0


@dataclass
class Simulation:
    """One rank's memory in bytes, its phases, and the step's samples.

    Attributes:
        resident: what is there between phases, by name.
        weights: the frozen models' share of one rank, on its device or its host, by role.
        gradients: on the device; `trained` parameters have one in fp32.
        kept: what stays gathered between micro-batches.
        scored: micro-batches of one rank in the whole step, by frozen model.
        kv_cache: with its `pages` of `page_size` tokens.
        runner: all that the rollout keeps for the next one, the cache among it.
        slots: sequences decoded at once, at most.
        decode_forwards, preempted: see `RolloutStats`.
        prefilled: chunks of prefixes that went through prefills, as (start, end).
        samples: of all ranks, with the lengths that were planned for.
        update_share: those that this rank scores and updates on, by micro-batch.
    """

    shapes: dict[str, ModelShape]
    world: World
    dtype: torch.dtype
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
    samples: list[Sample] = field(default_factory=list)
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
    know_collectives()
    dist.init_process_group("fake", rank=0, world_size=cluster.world_size, store=FakeStore())
    try:
        layout = job.layout
        world = build_world(torch.device("cpu"), layout.replicate, layout.shard, layout.tensor)
        shapes = {
            role: inspect_shape(spec, layout.tensor, [CONFIG]) for role, spec in job.models.items()
        }
        result = Simulation(shapes, world, compute_dtype(job))
        result.samples = _samples(job, prompt_tokens, response_tokens)
        step = _Step(job, cluster, result)
        kernels = like_cuda() if cluster.on_cuda else nullcontext()
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with kernels, fake, step.tracker, step.tracker.watch():
            step.run()
        return result
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


class _CopiedWeights(GeneratorWeights):
    """Of a model on the host, which shares no storage with a generator on the GPU."""

    def _own_storage(self, parameter: torch.Tensor) -> None:
        return None


class _Step:
    """The phases in the order of the trainer's step."""

    def __init__(self, job: ResolvedJob, cluster: Cluster, result: Simulation) -> None:
        self.job, self.config, self.cluster, self.result = job, job.config, cluster, result
        self.world, self.dtype = result.world, result.dtype
        self.tracker = Tracker(gloo=not cluster.on_cuda)
        self.on_host = 0  # bytes that the plan holds, but the cluster's devices would not
        mode = self.config.activation_checkpoint.mode
        # Compiled code is not traced here. It keeps about what selective checkpointing keeps.
        if job.compiled and mode == "none":
            mode = "selective"
        self.models = {
            role: parallel_model(shape, self.world, self.dtype, mode, False)
            for role, shape in result.shapes.items()
        }

    def run(self) -> None:
        self._load()
        if self.config.rollout.on_policy_fraction > 0.0:
            with self._phase("sync"):
                self.weights.sync()
            self._rollout()
        if self.job.validation_sets:
            self._validate()
        self.weights.release()
        plan = self._plan()
        for role in self.models:
            if is_teacher(role):
                self._score(role, "teacher", taught_by(role, plan))
        if "reference" in self.models:
            self._score("reference", "reference", plan)
        self._update(plan)

    def _load(self) -> None:
        shapes, memory = self.result.shapes, self.cluster.memory
        self.kept = choose(self.job, self.models, shapes, self.world, memory)
        self.kept.apply(self.models)
        self.result.kept = self.kept
        for role, model in self.models.items():
            before = self.tracker.live
            allocate(model, self.world.device)
            for parameter in model.parameters():
                self.tracker.add(local(parameter))
            self.result.weights[role] = self.tracker.live - before
            self._hold(f"{role} weights", self.tracker.live - before, role)
        self.student = self.models["student"]
        self.optimizer = build_optimizer(self.student, self.config.optimizer)
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
        # A CPU's own layout of weights takes as many bytes, but is not for tensors without data.
        return kind(self.models[role], build, self.dtype, self.world.device, pack=False)

    def _is_on_host(self, role: str) -> bool:
        return self.cluster.on_cuda and self.job.models[role].cpu_offload

    def _hold(self, name: str, size: int, role: str | None = None) -> None:
        """Note what stays, unless the recipe keeps it on the host."""
        if role is not None and self._is_on_host(role):
            self.on_host += size
            size = 0
        self.result.resident[name] = size

    @contextmanager
    def _phase(
        self, name: str, times: float = 1.0, gathers: float | None = None
    ) -> Iterator[Phase]:
        """Note a phase's peak and traffic. The body stands for a share of it, done `times`.

        The body may change the share, by `phase.times` and `phase.calls`.

        Args:
            gathers: how often what is sent over the data-parallel axes is sent, if not as often.
        """
        tracker, phase = self.tracker, self.result.phases.setdefault(name, Phase())
        phase.times = phase.calls = times
        tracker.reset()
        yield phase
        phase.peak = max(phase.peak, tracker.peak - self.on_host)
        mesh = self.world.mesh
        for axis in axes(mesh):
            group = mesh.get_group(axis).group_name
            sent, calls = phase.times, phase.calls
            if gathers is not None and axis != "tp":
                sent = calls = gathers
            phase.sent[axis] += tracker.sent[group] * sent
            phase.collectives[axis] += tracker.collectives[group] * calls

    def _generator(self, weights: GeneratorWeights) -> PlannedGenerator:
        c = self.config
        budget = c.training.max_tokens_per_microbatch
        concurrent, tp = c.rollout.max_concurrent, self.world.tp
        generator = PlannedGenerator(weights.model, {0}, concurrent, budget, tp)
        spent = self.tracker.live - self.on_host + self.cluster.reserve
        generator.budget = int(self.cluster.memory - spent)
        return generator

    @torch.no_grad()
    def _rollout(self) -> None:
        r, result = self.config.rollout, self.result
        requests = [Request(s.prompt, s.sample_index, 0) for s in result.rollout_share]
        generator = self._generator(self.weights)
        generator.response_tokens = len(result.samples[0].response_ids)
        params = SamplingParams(r.max_new_tokens, r.temperature, r.top_p, r.top_k)
        before = self.tracker.live
        runner = self._sample("rollout", generator, requests, params)
        result.runner = self.tracker.live - before if runner.static else 0
        result.kv_cache, result.page_size = runner.cache.num_bytes, runner.cache.page_size
        result.slots, result.pages = runner.slots, runner.cache.num_pages
        result.decode_forwards = generator.stats.decode_forwards
        result.preempted = generator.stats.preempted
        result.prefilled = runner.chunks

    @torch.no_grad()
    def _validate(self) -> None:
        """Simulate the validation at step 0, with a copy of the largest teacher if there is one."""
        v, r = self.config.validation, self.config.rollout
        prompts = v.max_prompts or _VALIDATION_PROMPTS
        mine = -(-prompts // self.world.dp.size)
        prompt = self.result.samples[0].prompt
        requests = [
            Request(replace(prompt, index=i), n, 0)
            for i in range(mine)
            for n in range(v.samples_per_prompt)
        ]
        weights = self.weights
        with self._phase("validation", 0):
            asked = {s.teacher for s in self.job.validation_sets}
            teachers = asked & self.models.keys()
            if teachers:
                self.weights.release()
                largest = max(sorted(teachers), key=self.result.weights.__getitem__)
                weights = self._generator_weights(largest)
            weights.sync()
        generator = self._generator(weights)
        params = SamplingParams(v.max_new_tokens or r.max_new_tokens, v.temperature)
        generator.response_tokens = params.max_new_tokens
        self._sample("validation", generator, requests, params, 0)

    def _sample(
        self,
        name: str,
        generator: PlannedGenerator,
        requests: list[Request],
        params: SamplingParams,
        times: int = 1,
    ) -> PlannedRunner:
        """The widest decoding step and the fullest prefill of a phase that does these `times`."""
        runner, tracker = generator.plan(requests, params), self.tracker
        with self._phase(name) as phase:
            rows = runner.run_widest()
            phase.times, phase.calls = times * runner.num_rows / rows, times * runner.num_decodes
            phase.operations = tracker.operations
        if runner.static:
            # What a step needs besides stays with its graphs.
            runner.memory_of_graphs = torch.empty(tracker.peak - tracker.live, dtype=torch.uint8)
        with self._phase(name) as phase:
            tokens = max(1, runner.run_fullest())
            phase.times = times * runner.num_prefilled / tokens
            phase.calls = times * runner.num_prefills
        return runner

    def _plan(self) -> list[Minibatch]:
        c, result = self.config, self.result
        budget = c.training.max_tokens_per_microbatch
        plan = plan_minibatches(result.samples, c.distill.minibatches, budget, self.world.dp)
        result.update_share = [samples for m in plan for samples in m.microbatches]
        if c.rollout.on_policy_fraction > 0.0:
            for s in chain.from_iterable(result.update_share):
                s.student_logprobs = torch.zeros(len(s.response_ids))
        return plan

    def _score(self, role: str, name: str, plan: list[Minibatch]) -> None:
        first, count = _first_microbatch(plan)
        if not count:
            return
        self.result.scored[role] = count
        model, rule = self.models[role], self._rule()
        whole, part = rule.needs_vocabulary, [Minibatch([first], 1, [role])]
        with self._phase(name, count, gathers=1 if role in self.kept.frozen else None):
            scored = score(model, part, rule.dist.untruncated, self.world, keep_hidden=whole)
        for sample, values in scored:
            setattr(sample, f"{name}_hidden" if whole else f"{name}_logprobs", values)
        if whole:  # those of the other micro-batches wait for the update as well
            like = scored[0][1]
            for s in chain.from_iterable(m for part in plan for m in part.microbatches):
                if getattr(s, f"{name}_hidden") is None:
                    shape = (len(s.response_ids), like.shape[1])
                    setattr(s, f"{name}_hidden", like.new_empty(shape))

    def _rule(self) -> UpdateRule:
        r = self.config.rollout
        vocab_size = common_vocab_size(self.result.shapes)
        dist_ = Distribution(r.temperature, r.top_k, r.top_p, vocab_size)
        c = self.config
        return UpdateRule.of(c.distill, c.reference, c.training, dist_)

    def _update(self, plan: list[Minibatch]) -> None:
        rule = self._rule()
        frozen = {r: m for r, m in self.models.items() if r != "student"}
        first, count = _first_microbatch(plan)
        if self._is_on_host("student"):
            self._make_gradients()
            self.on_host += self.result.gradients
            self.result.gradients = 0
        teacher = first[0].prompt.teacher if first else ""
        models = models_of(teacher, frozen if rule.needs_vocabulary else {})
        once = self.kept.gradients
        with resharding(self.student), gathered_heads(models) as heads:
            for times, last in _passes(count, len(plan)):
                exchange_gradients(self.student, last, once)
                with self._phase("update", times):
                    forward_backward(self.student, first, 1, rule, self.world, heads)
        with self._phase("update", len(plan)):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def _passes(microbatches: int, updates: int) -> list[tuple[float, bool]]:
    """How often there is a first micro-batch of an update, one in between, and a last one.

    Returns:
        Those that there are, and whether each is the last: each finds what the one before it keeps.
    """
    firsts = min(updates, microbatches - updates)
    passes = [(firsts, False), (microbatches - updates - firsts, False), (updates, True)]
    return [(times, last) for times, last in passes if times]


def _first_microbatch(plan: list[Minibatch]) -> tuple[list[Sample], int]:
    """The fullest one stands for all of them, and how many there are."""
    microbatches = [m for minibatch in plan for m in minibatch.microbatches]
    return max(microbatches, key=cost, default=[]), len(microbatches)
