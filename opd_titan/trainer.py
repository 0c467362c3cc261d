"""Build everything, then the loop: rollout, score, update, sync; validate, checkpoint, export."""

from __future__ import annotations

import logging
import signal
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opd_titan.build import check_lengths, compute_dtype, inspect_models, load_model
from opd_titan.checkpoint.checkpointer import (
    Checkpointer,
    agree_on_step,
    inspect_checkpoint,
    open_folder,
)
from opd_titan.checkpoint.hf_export import export_hf
from opd_titan.config import JobConfig, to_toml
from opd_titan.data.grading import grade
from opd_titan.data.loader import PromptLoader
from opd_titan.data.prompts import PromptSet, build_prompts, response_token_ids
from opd_titan.data.tokenizer import eos_warning
from opd_titan.data.types import Prompt, Sample
from opd_titan.distill.objectives import OBJECTIVES, ObjectiveSettings
from opd_titan.distill.packing import Minibatch, plan_minibatches
from opd_titan.distill.scoring import score
from opd_titan.distill.update import UpdateRule, update
from opd_titan.distributed.collectives import max_scalar
from opd_titan.distributed.world import build_mesh, init_world, set_timeout
from opd_titan.errors import ConfigError
from opd_titan.model_card import model_card
from opd_titan.models.logits import Distribution
from opd_titan.observability.logging import init_logging
from opd_titan.observability.profiling import maybe_profiler
from opd_titan.observability.progress import Bar, progress
from opd_titan.observability.recorder import Recorder
from opd_titan.optim import build_optimizer, learning_rate, set_learning_rate
from opd_titan.preflight import probe, report
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.rollout import sample_responses
from opd_titan.rollout.weights import GeneratorWeights
from opd_titan.validate import Baselines, Validator, build_validator, prompt_options

logger = logging.getLogger("opd_titan")


class Trainer:
    """One distillation job. The constructor checks everything before it loads any weight."""

    def __init__(self, config: JobConfig) -> None:
        self.config = config
        self.device = init_world(config.comm.init_timeout_seconds)
        if config.training.deterministic and self.device.type == "cuda":
            # The sampler's prefix sums have no deterministic kernel there.
            raise ConfigError("[training] deterministic: true is built for the CPU only so far")
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.folder = Path(config.job.dump_folder)
        init_logging(None, self.rank)
        parallelism = config.parallelism
        self.mesh = build_mesh(
            self.device,
            parallelism.data_parallel_replicate_degree,
            parallelism.data_parallel_shard_degree,
        )
        self._inspect_models()
        self._build_data()
        self._find_checkpoint()
        self._open_folder()
        self._build_models()
        self._build_rules()
        self.step = 0
        self.saved_at = self.resumed_at
        self.stop_signal: int | None = None

    # ------------------------------------------------------------------ build

    def _inspect_models(self) -> None:
        self.sources = inspect_models(self.config)
        self.tokenizer = self.sources["student"].tokenizer
        self.decode = partial(self.tokenizer.decode, skip_special_tokens=True)

    def _find_checkpoint(self) -> None:
        """Which step to go on from, and whether this recipe can, before anything is written."""
        c, folder = self.config.checkpoint, self.folder / "checkpoint"
        self.resumed_at = agree_on_step(folder, c.load_step if c.enable else 0) or 0
        self.saved_state: dict[str, Any] | None = None
        if self.resumed_at:
            with torch.device("meta"):
                shapes = self.sources["student"].build()
            self.saved_state = inspect_checkpoint(folder, self.resumed_at, shapes)
            self.loader.load_state_dict(self.saved_state["loader"])

    def _build_data(self) -> None:
        c = self.config
        options = prompt_options(c, self.tokenizer)
        self.prompt_set: PromptSet = build_prompts(
            dataset=c.data.dataset,
            path=c.data.path,
            split=c.data.split,
            keep_responses=c.rollout.on_policy_fraction < 1.0,
            **options,
        )
        prompts = self.prompt_set.prompts
        self.loader = PromptLoader(
            prompts,
            prompts_per_step=c.rollout.prompts_per_step,
            seed=c.training.seed,
            shuffle=c.data.shuffle,
        )
        sources = self.sources.values()
        check_lengths(sources, prompts, c.rollout.max_new_tokens, "rollout")
        self.total_steps = c.training.epochs * self.loader.batches_per_epoch or c.training.steps
        self.validator: Validator | None = None
        if c.validation.enable:
            self.validator = build_validator(c, options, prompts, self.decode, self.rank)
            new_tokens = self.validator.params.max_new_tokens
            check_lengths(sources, self.validator.prompts, new_tokens, "validation")

    def _open_folder(self) -> None:
        """From here on the job writes: every mistake that can be known by now has been named."""
        resolved = to_toml(self.config)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            init_logging(self.folder, self.rank)
            if self.rank == 0:
                (self.folder / "config.resolved.toml").write_text(resolved, encoding="utf-8")
            if self.config.checkpoint.enable:
                open_folder(self.folder / "checkpoint")
        except OSError as error:
            raise ConfigError(
                f"[job] dump_folder: {self.folder} cannot be written ({error.strerror}); choose a "
                f"folder that can"
            ) from error
        if self.config.job.print_config:
            logger.info("Resolved config:\n%s", resolved)
        found = self.prompt_set
        logger.info(
            "Data: %s: %s prompts kept of %s rows (%s duplicates, %s over %s tokens); %s steps",
            found.source,
            len(found.prompts),
            found.num_rows,
            found.num_duplicates,
            found.num_too_long,
            self.config.data.max_prompt_tokens,
            self.total_steps,
        )
        if self.validator is not None:
            self.validator.warn_if_not_held_out()
        if "teacher" in self.sources:
            eos_ids = (self.sources[role].eos_ids for role in ("student", "teacher"))
            warning = eos_warning(*eos_ids, self.tokenizer)
            if warning:
                logger.warning("%s", warning)

    def _build_models(self) -> None:
        c = self.config
        torch.use_deterministic_algorithms(c.training.deterministic)
        self.dtype = compute_dtype(c, self.device)
        self.student = self._load("student", torch.float32)
        self.teacher = self._load("teacher", self.dtype)
        self.reference = self._load("reference", self.dtype)
        self.optimizer = build_optimizer(self.student, c)
        self.checkpointer = Checkpointer(
            self.folder / "checkpoint",
            self.student,
            self.optimizer,
            keep_latest_k=c.checkpoint.keep_latest_k,
            background=c.checkpoint.async_mode == "async",
        )
        self.weights = GeneratorWeights(self.student, self.sources["student"].build, self.dtype)
        self.generator = self._generator("student", self.weights)

    def _load(self, role: str, param_dtype: torch.dtype) -> Any:
        source = self.sources.get(role)
        if source is None:
            return None
        start = time.perf_counter()
        model = load_model(
            source,
            self.mesh,
            self.device,
            param_dtype=param_dtype,
            compute_dtype=self.dtype,
            seed=self.config.training.seed,
        )
        if role != "student":
            model.requires_grad_(False).eval()
        logger.info(
            "%s: %s, %s parameters, %s, in %.1f s",
            role.capitalize(),
            source.folder,
            f"{sum(p.numel() for p in model.parameters()):,}",
            "RANDOM weights" if source.files is None else "weights loaded",
            time.perf_counter() - start,
        )
        return model

    def _generator(self, role: str, weights: GeneratorWeights) -> Generator:
        c = self.config
        return Generator(
            weights.model,
            self.sources[role].eos_ids,
            c.rollout.max_concurrent,
            c.training.max_tokens_per_microbatch,
        )

    def _build_rules(self) -> None:
        c = self.config
        r, d = c.rollout, c.distill
        self.sampling = SamplingParams(
            r.max_new_tokens, r.temperature, r.top_p, r.top_k, r.ignore_eos
        )
        # A teacher is scored whole, whatever the student's samples were cut to.
        self.teacher_distribution = Distribution(r.temperature)
        settings = ObjectiveSettings(
            clip_low=d.clip_low,
            clip_high=d.clip_high,
            reference_coef=c.reference.coef,
            log_ratio_clamp=d.log_ratio_clamp,
            true_ratio=d.minibatches > 1,
        )
        self.rule = UpdateRule(
            OBJECTIVES[d.objective], settings, self.sampling.distribution, c.training.max_grad_norm
        )

    # ------------------------------------------------------------------- loop

    def train(self) -> int:
        """Run the job to its end, or to a signal. Returns the exit code, see `train.main`."""
        self._resume()
        self._set_aside_newer()
        self._listen_for_signals()
        self.recorder = Recorder(
            self.config,
            device=self.device,
            dtype=self.dtype,
            decode=self.decode,
            grade=grade,
            forward_flops={role: s.args.forward_flops for role, s in self.sources.items()},
            start_step=self.step,
            total_steps=self.total_steps,
        )
        if self.saved_state is not None:
            self.recorder.metrics.load_state_dict(self.saved_state["recorder"])
        # Loading is over; from here on a rank may lag as long as a rollout takes.
        set_timeout(self.config.comm.train_timeout_seconds, self.device)
        self._before_first_step()
        profiling = self.config.profiling
        with maybe_profiler(
            profiling.enable, profiling.interval, self.folder, self.rank, start_step=self.step
        ) as profiler:
            while self.step < self.total_steps and not self._stopping():
                self.train_step()
                profiler.step()
        return self._finish()

    def train_step(self) -> None:
        """One step: prompts, rollout, scores, update; then what is due after it."""
        self.step += 1
        phase = self.recorder.clock.phase
        with phase("step"):
            with phase("data"):
                prompts = next(self.loader)
            with phase("rollout"):
                samples = self.rollout(prompts)
            plan = self.plan(samples)
            with phase("teacher"):
                self.score(self.teacher, "teacher_logprobs", plan)
            with phase("reference"):
                self.score(self.reference, "reference_logprobs", plan)
            with phase("update"):
                scalars = self.update(plan)
            with phase("sync"):
                self.weights.sync()
        self.recorder.record(self.step, samples, scalars)
        self._after_step()

    def rollout(self, prompts: list[Prompt]) -> list[Sample]:
        """The step's responses: the student's own, or the data set's."""
        r = self.config.rollout
        if r.on_policy_fraction == 0.0:
            return [self._given_response(p) for p in prompts]
        most = len(prompts[self.rank :: self.ranks]) * r.group_size * r.max_new_tokens
        with progress(most, f"step {self.step} rollout", "tok", rank=self.rank) as bar:
            return sample_responses(
                self.generator,
                prompts,
                r.group_size,
                self.sampling,
                (self.config.training.seed, self.step),
                bar.update,
            )

    def _given_response(self, prompt: Prompt) -> Sample:
        limit, stop_ids = self.config.rollout.max_new_tokens, self.sources["student"].eos_ids
        # A model may have several stop tokens; the tokenizer's own ends what people wrote.
        eos_id = self.tokenizer.eos_token_id
        eos_id = eos_id if eos_id in stop_ids else min(stop_ids)
        ids = list(response_token_ids(prompt, self.tokenizer, eos_id))
        return Sample(prompt, 0, ids[:limit], "stop" if len(ids) <= limit else "length")

    def plan(self, samples: list[Sample]) -> list[Minibatch]:
        """This rank's share of the step's updates, in micro-batches."""
        return plan_minibatches(
            samples,
            self.config.distill.minibatches,
            self.config.training.max_tokens_per_microbatch,
            self.rank,
            self.ranks,
        )

    def score(self, model: Any, field: str, plan: list[Minibatch]) -> None:
        """Give every sample of this rank the frozen model's log-probs."""
        if model is None:
            return
        with self._sequence_bar(field.removesuffix("_logprobs"), plan) as bar:
            scored = score(model, plan, self.teacher_distribution, self.device, bar.update)
        for sample, logprobs in scored:
            setattr(sample, field, logprobs)

    def update(self, plan: list[Minibatch]) -> dict[str, float]:
        """Move the student."""
        rate = learning_rate(self.step, self.total_steps, self.config)
        set_learning_rate(self.optimizer, rate)
        with self._sequence_bar("update", plan) as bar:
            scalars = update(self.student, self.optimizer, plan, self.rule, self.device, bar.update)
        return {**scalars, "lr": rate}

    def _sequence_bar(self, phase: str, plan: list[Minibatch]) -> Bar:
        count = sum(len(m) for minibatch in plan for m in minibatch.microbatches)
        return progress(count, f"step {self.step} {phase}", "seq", rank=self.rank)

    # ----------------------------------------------------- before, after, end

    def _before_first_step(self) -> None:
        c = self.config
        if self.teacher is not None:
            result = probe(
                self.student,
                self.generator,
                self.prompt_set.prompts,
                self.sampling,
                c.training.seed,
                self.device,
            )
            report(result, self.dtype)
        if self.validator is not None and self.step == 0:
            with self.recorder.clock.phase("validate"):
                if self.teacher is not None:
                    self._measure_teacher()
                self._validate()
            self.recorder.record_pauses(0)

    def _measure_teacher(self) -> None:
        weights = GeneratorWeights(self.teacher, self.sources["teacher"].build, self.dtype)
        self.validator.measure_teacher(self._generator("teacher", weights))

    def _validate(self) -> None:
        scalars = self.validator.measure_student(self.generator, self.step)
        self.recorder.metrics.log(self.step, scalars)

    def _after_step(self) -> None:
        c, last = self.config, self.step == self.total_steps

        def due(interval: int) -> bool:
            return last or (interval > 0 and self.step % interval == 0)

        if self.validator is not None and due(c.validation.interval):
            with self.recorder.clock.phase("validate"):
                self._validate()
        self.checkpointer.poll()
        # First the export: a run that is killed in between makes it again on its way here.
        if due(c.export.interval):
            self._export()
        if c.checkpoint.enable and due(c.checkpoint.interval):
            self._save()
        self.recorder.record_pauses(self.step)

    def _finish(self) -> int:
        stopped, saves = self.step < self.total_steps, self.config.checkpoint.enable
        if stopped and saves and self.step not in (0, self.saved_at):
            self._save()
        self.checkpointer.wait()
        self.recorder.metrics.close()
        dist.barrier()  # a rank that leaves early breaks the others' last collective
        if not stopped:
            logger.info("Done: %s steps; everything is in %s", self.step, self.folder)
            return 0
        outcome = "with a complete checkpoint; start again to go on"
        if self.step == 0:
            outcome = "before there was anything to save; start again"
        if not saves:
            outcome = "and nothing was saved, for checkpoint.enable is false"
        logger.warning(
            "Stopped by signal %s after step %s %s", self.stop_signal, self.step, outcome
        )
        return 75 if saves else 1

    # ------------------------------------------------------ state and signals

    def _resume(self) -> None:
        """Go to where the run starts, and say why there."""
        c = self.config.checkpoint
        if self.saved_state is None:
            reason = "checkpoint.enable is false" if not c.enable else "no complete checkpoint"
            reason = "checkpoint.load_step is 0" if c.load_step == 0 else reason
            logger.info("Starting at step 1: %s in %s", reason, self.checkpointer.folder)
            return
        self.checkpointer.load(self.resumed_at)
        self.weights.sync()
        self.step = self.resumed_at
        why = "the newest complete checkpoint" if c.load_step == -1 else "checkpoint.load_step"
        logger.info(
            "Resumed from %s/step-%s (%s): weights of student.hf_path are replaced; next step %s",
            self.checkpointer.folder,
            self.step,
            why,
            self.step + 1,
        )
        if self.validator is not None:
            self._restore_baselines()

    def _restore_baselines(self) -> None:
        if self.saved_state["measured_by"] == self._measured_by():
            self.validator.baselines = Baselines(**self.saved_state["baselines"])
        else:
            logger.warning(
                "What is validated, or the teacher, changed since the checkpoint: its start and "
                "teacher accuracies do not compare with today's; no gap_recovered from here on"
            )

    def _measured_by(self) -> dict[str, Any]:
        """What the baselines depend on."""
        teacher = self.config.teacher
        return {
            "validation": self.validator.identity() if self.validator else None,
            "teacher": {"hf_path": teacher.hf_path, "random_init": teacher.random_init},
        }

    def _set_aside_newer(self) -> None:
        """A run that goes back replaces what came after; nothing may resume from that."""
        c = self.config.checkpoint
        if not c.enable or c.load_step < 0:
            return
        later = self.checkpointer.set_aside_after(self.resumed_at)
        if later:
            names = ", ".join(f"step-{n}" for n in later)
            logger.info("Set aside as step-N.old, for this run replaces them: %s", names)

    def _save(self) -> None:
        state = {
            "step": self.step,
            "measured_by": self._measured_by(),
            "baselines": asdict(self.validator.baselines if self.validator else Baselines()),
            "recorder": self.recorder.metrics.state_dict(),
            "loader": self.loader.state_dict(),
        }
        with self.recorder.clock.phase("checkpoint"):
            self.checkpointer.save(self.step, state)
        self.saved_at = self.step
        verb = "writing" if self.config.checkpoint.async_mode == "async" else "wrote"
        logger.info("Checkpoint: %s %s/step-%s", verb, self.checkpointer.folder, self.step)

    def _export(self) -> None:
        name = self.config.export.dtype
        out = self.folder / "hf" / f"step-{self.step}"
        source = self.sources["student"]
        with self.recorder.clock.phase("checkpoint"):
            export_hf(
                self.student,
                out,
                source_folder=source.folder,
                key_table=source.key_table,
                dtype=None if name == "auto" else getattr(torch, name),
                card=model_card(self.config, self.step, self.recorder.metrics.last),
            )
        self.student.reshard()
        logger.info("Export: %s", out)

    def _listen_for_signals(self) -> None:
        def remember(number: int, _frame: Any) -> None:
            self.stop_signal = number

        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, remember)

    def _stopping(self) -> bool:
        """Whether any rank was told to stop; all ranks must agree, or collectives would hang."""
        return max_scalar(float(self.stop_signal or 0), self.device) > 0
