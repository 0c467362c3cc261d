"""Build everything, then the loop: rollout, score, update, sync; validate, checkpoint, export."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opd_titan.checkpoint.checkpointer import Checkpointer
from opd_titan.checkpoint.hf_export import export_hf, is_exported
from opd_titan.checkpoint.model_card import model_card
from opd_titan.checkpoint.publish import link_latest
from opd_titan.checkpoint.steps import set_aside
from opd_titan.config import JobConfig
from opd_titan.config.sets import is_teacher
from opd_titan.data.pieces import TokenTexts
from opd_titan.data.prompts import given_response
from opd_titan.data.types import Prompt, Sample
from opd_titan.distill.optim import build_optimizer, learning_rate, set_learning_rate
from opd_titan.distill.packing import Minibatch, plan_minibatches, taught_by
from opd_titan.distill.scoring import score
from opd_titan.distill.update import UpdateResult, UpdateRule, update
from opd_titan.distributed.heartbeat import Heartbeat
from opd_titan.distributed.monitor import Monitor
from opd_titan.distributed.stopping import Stopped, StopRequest
from opd_titan.distributed.world import set_timeout
from opd_titan.errors import OneLineError, StorageError
from opd_titan.models.transforms import num_compiled_graphs
from opd_titan.observability.console import report_job
from opd_titan.observability.profiling import maybe_profiler
from opd_titan.observability.progress import Bar, progress
from opd_titan.observability.recorder import Recorder
from opd_titan.observability.watchdog import Watchdog
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.memory import StepMemory
from opd_titan.rollout.rollout import in_order, sample_responses, split_on_policy
from opd_titan.rollout.weights import GeneratorWeights
from opd_titan.training.gathering import keep_what_fits
from opd_titan.training.models import build_generator, common_vocab_size, compiles, load_model
from opd_titan.training.nonfinite import SkippedUpdates
from opd_titan.training.self_check import probe, report
from opd_titan.training.setup import STATE_FORMAT, prepare, sent_back

logger = logging.getLogger("opd_titan")


class Trainer:
    """One distillation job. The constructor checks everything before it loads any weight."""

    def __init__(self, config: JobConfig, stop: StopRequest, heartbeat: Heartbeat) -> None:
        self.config, self.stop = config, stop
        self.job = prepare(config)
        self.world, self.device = self.job.world, self.job.world.device
        self.monitor = Monitor(stop, heartbeat, self.world)
        self.sources, self.validator = self.job.sources, self.job.validator
        self.total_steps = self.job.total_steps
        self.on_policy = config.rollout.on_policy_fraction > 0.0
        self._build_models()
        self._build_rules()
        self.step = self.graphs = self.exported_at = 0
        self.skipped = SkippedUpdates(config, self.job.decode, self.job.grade)
        self.watchdog = Watchdog(config, self.job.dtype)
        self.saved_at = self.job.resumed_at
        self.export_fault: StorageError | None = None
        self.pauses_due = False  # what comes after the last step has not been done

    # ------------------------------------------------------------------ build

    def _build_models(self) -> None:
        c = self.config
        torch.use_deterministic_algorithms(c.training.deterministic)
        models = {role: self._load(role) for role in self.sources}
        self.kept = keep_what_fits(c, models, self.sources, self.world, self.job.dtype)
        self.student, self.frozen = models.pop("student"), models
        self.optimizer = build_optimizer(self.student, c)
        self.checkpointer = Checkpointer(
            self.job.folder / "checkpoint",
            self.student,
            self.optimizer,
            keep_latest_k=c.checkpoint.keep_latest_k,
            background=c.checkpoint.async_mode == "async",
        )
        self.memory = StepMemory(self.device)
        self.weights, self.generator = self._generator("student", self.student, self.memory)

    def _load(self, role: str) -> Any:
        self.monitor.set_phase(f"the loading of the {role}")
        self.stop.check()
        return load_model(self.sources[role], self.world, self.config, self.job.dtype)

    def _generator(self, role: str, model: Any, *memory: Any) -> tuple[GeneratorWeights, Generator]:
        source, dtype = self.sources[role], self.job.dtype
        return build_generator(source, model, self.world, self.config, dtype, *memory)

    def _build_rules(self) -> None:
        c, r = self.config, self.config.rollout
        self.sampling = SamplingParams(
            max_new_tokens=r.max_new_tokens,
            temperature=r.temperature,
            top_p=r.top_p,
            top_k=r.top_k,
            ignore_eos=r.ignore_eos,
            max_tokens=r.max_tokens_per_step,
            vocab_size=common_vocab_size(self.sources),
        )
        self.rule = UpdateRule.of(c, self.sampling.distribution)

    # ------------------------------------------------------------------- loop

    def train(self) -> int:
        """Run the job to its end, or to a signal. Returns the exit code, see `train.main`."""
        report_job(self.config, self.total_steps, self.job.dtype, self.student, self.frozen)
        self._resume()
        if self.job.saved_state is not None:
            self.watchdog.load_state_dict(self.job.saved_state["watchdog"])
        self._set_aside_newer()
        self._start_recording()
        # Loading is over; from here on a rank may lag as long as a rollout takes.
        set_timeout(self.config.comm.train_timeout_seconds, self.device)
        self.monitor.heartbeat.limit = self.config.comm.train_timeout_seconds
        stopped = False
        try:
            self._before_first_step()
            self._run_steps()
        except Stopped:
            stopped = True
        except OneLineError:  # of all ranks: what is being written is good, and may be the only one
            self.checkpointer.wait()
            raise
        return self._finish(stopped)

    def _start_recording(self) -> None:
        self.recorder = Recorder(
            self.config,
            world=self.world,
            dtype=self.job.dtype,
            decode=self.job.decode,
            grade=self.job.grade,
            forward_flops={role: s.args.forward_flops for role, s in self.sources.items()},
            decode_bytes=self.sources["student"].args.decode_bytes,
            start_step=self.step,
            total_steps=self.total_steps,
            whole=self.rule.needs_vocabulary,
            texts=TokenTexts(self.job.tokenizer),
        )
        if self.job.saved_state is not None:
            self.recorder.metrics.load_state_dict(self.job.saved_state["recorder"])

    def _run_steps(self) -> None:
        profiling = self.config.profiling
        with maybe_profiler(
            profiling.enable,
            profiling.interval,
            self.job.folder,
            dist.get_rank(),
            start_step=self.step,
        ) as profiler:
            while self.step < self.total_steps:
                good = self.train_step()
                if good is None:
                    self.after_step()
                else:
                    self._go_back(good)
                profiler.step()

    def train_step(self) -> int | None:
        """One step: prompts, rollout, scores, update. Where the watchdog sends it back to, if so.

        Raises:
            Stopped: on a signal, before the weights were touched: the step has not been begun.
        """
        place = self.job.loader.state_dict()
        self.step += 1
        try:
            samples, result = self._sample_and_learn()
        except Stopped:
            self.step -= 1
            self.job.loader.load_state_dict(place)
            raise
        scalars = self.recorder.record(
            self.step, samples, result.scalars, **asdict(self.generator.stats)
        )
        self.skipped.look_at(self.step, result)
        return self.watchdog.look_at(self.step, scalars)

    def _sample_and_learn(self) -> tuple[list[Sample], UpdateResult]:
        phase = self._phase
        with phase("step"):
            with phase("data"):
                self.stop.check()
                prompts = next(self.job.loader)
            with phase("sync"):
                if self.on_policy:
                    self.weights.sync()
            with phase("rollout"):
                samples = self.rollout(prompts)
                self.recorder.choose(samples)
                self.memory.make_room(self.weights, self.generator)
            plan = self.plan(samples)
            with phase("teacher"):
                for role in filter(is_teacher, self.frozen):
                    self.score(role, "teacher", taught_by(role, plan))
            with phase("reference"):
                if "reference" in self.frozen:
                    self.score("reference", "reference", plan)
            with phase("update"):
                result = self.update(plan)
                self.weights.mark_stale()
                self.memory.measure(any(result.made), self.kept.usable - self.kept.needed)
        return samples, result

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.monitor.set_phase(f"phase {name} of step {self.step}")
        with self.recorder.clock.phase(name):
            yield

    def rollout(self, prompts: list[Prompt]) -> list[Sample]:
        """The step's responses, of each prompt the student's own or the data set's."""
        r, dp = self.config.rollout, self.world.dp
        stream = (self.config.training.seed, self.step)
        sampled, given = split_on_policy(prompts, r.on_policy_fraction, stream)
        most = len(sampled[dp.rank :: dp.size]) * r.group_size * r.max_new_tokens
        with progress(most, f"step {self.step} rollout", "tok", rank=dist.get_rank()) as bar:
            on_tokens = self.monitor.on_tokens(bar)
            samples = sample_responses(
                self.generator, sampled, r.group_size, self.sampling, stream, dp, on_tokens
            )
        samples += [
            given_response(p, self.job.tokenizer, self.sources["student"].eos_ids, r.max_new_tokens)
            for p in given
        ]
        return in_order(samples, prompts)

    def plan(self, samples: list[Sample]) -> list[Minibatch]:
        """This rank's share of the step's updates, in micro-batches."""
        return plan_minibatches(
            samples,
            self.config.distill.minibatches,
            self.config.training.max_tokens_per_microbatch,
            self.world.dp,
        )

    def score(self, role: str, name: str, plan: list[Minibatch]) -> None:
        """Give the plan's samples a frozen model's log-probs, or what they follow from.

        Args:
            role: whose model.
            name: what samples call it: "teacher", whichever it is, or "reference".
        """
        whole = self.rule.needs_vocabulary
        with self._sequence_bar(role, plan) as bar:
            scored = score(
                self.frozen[role],
                plan,
                self.rule.dist.untruncated,
                self.world,
                self.monitor.on_sequences(bar),
                whole,
                name,
            )
        for sample, values in scored:
            setattr(sample, f"{name}_hidden" if whole else f"{name}_logprobs", values)

    def update(self, plan: list[Minibatch]) -> UpdateResult:
        """Move the student."""
        rate = self.watchdog.slowdown * learning_rate(self.step, self.total_steps, self.config)
        set_learning_rate(self.optimizer, rate)
        frozen = self.frozen if self.rule.needs_vocabulary else {}
        with self._sequence_bar("update", plan) as bar:
            # Once the weights have moved, the step has to be done to its end.
            on_sequences = self.monitor.on_sequences(bar, stops=len(plan[0].microbatches))
            result = update(
                self.student,
                self.optimizer,
                plan,
                self.rule,
                self.world,
                on_sequences,
                frozen,
                exchange_once=self.kept.gradients,
            )
        result.scalars["lr"] = rate
        return result

    def _sequence_bar(self, phase: str, plan: list[Minibatch]) -> Bar:
        sequences = sum(len(m) for minibatch in plan for m in minibatch.microbatches)
        return progress(sequences, f"step {self.step} {phase}", "seq", rank=dist.get_rank())

    # ----------------------------------------------------- before, after, end

    def _before_first_step(self) -> None:
        teachers = [role for role in self.frozen if is_teacher(role)]
        if teachers:
            self.monitor.set_phase("the comparison of rollout and training")
            self.weights.sync()
            prompts, seed = self.job.prompt_sets[0].prompts, self.config.training.seed
            found = probe(self.student, self.generator, prompts, self.sampling, seed, self.world)
            report(found, self.job.dtype)
        if self.validator is not None and self.step == 0:
            with self._phase("validate"):
                for role in teachers:
                    self._measure_teacher(role)
                scalars = self._validate()
            self.recorder.record_pauses(0, scalars)
        state = self.job.saved_state
        if state is not None and state["pauses_due"]:
            self.after_step()
        elif self.step == self.total_steps:
            # What is there may be of another run, which this one was sent back from.
            if self.exported_at != self.step or not is_exported(self._export_folder()):
                self._export()

    def _measure_teacher(self, role: str) -> None:
        assert self.validator is not None
        if role not in (s.teacher for s in self.validator.sets):
            return
        # Two copies at once would be the peak of the whole run.
        self.weights.release()
        self.generator.release()
        weights, generator = self._generator(role, self.frozen[role])
        weights.sync()
        self.validator.measure_teacher(generator, role, self.monitor.on_tokens)
        del weights, generator
        gc.collect()  # a compiled block refers to itself

    def _validate(self) -> dict[str, float]:
        assert self.validator is not None
        self.weights.sync()
        scalars = self.validator.measure_student(self.generator, self.step, self.monitor.on_tokens)
        self.generator.release()  # its cache suits no other phase
        self.recorder.metrics.validated(self.step, scalars)  # for what is exported or saved next
        return scalars

    def _report_compiling(self) -> None:
        """Graphs are made in the first steps; whoever sees more of them later knows why it lags."""
        graphs = num_compiled_graphs()
        if graphs > self.graphs:
            new = graphs - self.graphs
            logger.info("Compiled %s graphs by the end of step %s (%s new)", graphs, self.step, new)
        self.graphs = graphs

    def after_step(self) -> None:
        """What is due: validation, export, checkpoint."""
        self.pauses_due = True
        if compiles(self.config):
            self._report_compiling()
        c, last = self.config, self.step == self.total_steps

        def due(interval: int) -> bool:
            return last or (interval > 0 and self.step % interval == 0)

        found: dict[str, float] = {}
        if self.validator is not None and due(c.validation.interval):
            with self._phase("validate"):
                found = self._validate()
        self.checkpointer.poll()
        # First the export: a run that is killed in between makes it again on its way here.
        if due(c.export.interval):
            self._export()
        self.pauses_due = False

        def record() -> None:
            self.recorder.record_pauses(self.step, found)
            found.clear()

        # The checkpoint that a run went on from says what was due then: it is replaced by one that
        # does not, or whoever resumes from it again would do and record it twice.
        replaced = self.saved_at == self.step
        if c.checkpoint.enable and (due(c.checkpoint.interval) or replaced):
            # Before it is published: a run that is killed after that would never say how long.
            self._save(record)
        record()

    def _finish(self, stopped: bool) -> int:
        saves = self.config.checkpoint.enable
        # Not what `_save` tried: the storage may have failed then, and be well now.
        if stopped and saves and self.step > 0 and self.checkpointer.secured() != self.step:
            self._save()
        self.recorder.metrics.close()
        if saves and self.saved_at:
            self.checkpointer.require(self.saved_at)
        if self.export_fault is not None:
            raise self.export_fault
        dist.barrier()  # a rank that leaves early breaks the others' last collective
        if not stopped:
            self.recorder.report_outcome(self.step)
            return 0
        outcome = "with a complete checkpoint; start again to go on"
        if self.step == 0:
            outcome = "before there was anything to save; start again"
        if not saves:
            outcome = "and nothing was saved, for checkpoint.enable is false"
        logger.warning(
            "Stopped by signal %s after step %s %s", self.stop.signal, self.step, outcome
        )
        return 75 if saves else 1

    # ------------------------------------------------------------------- state

    def _resume(self) -> None:
        """Go to where the run starts, and say why there."""
        if self.job.saved_state is None:
            logger.info("Starting at step 1: %s in %s", self.job.why, self.checkpointer.folder)
            return
        self.monitor.set_phase(f"the loading of the checkpoint of step {self.job.resumed_at}")
        self.checkpointer.load(self.job.resumed_at)
        self.step = self.job.resumed_at
        self.skipped.in_a_row = self.job.saved_state["skipped_in_a_row"]
        self.exported_at = self.job.saved_state["exported_at"]
        logger.info(
            "Resumed from %s/step-%s (%s): weights of student.hf_path are replaced; next step %s",
            self.checkpointer.folder,
            self.step,
            self.job.why,
            self.step + 1,
        )
        if self.validator is not None:
            self.validator.load_state_dict(self.job.saved_state["validator"])

    def _set_aside_newer(self) -> None:
        """What came after the step that a run goes on from is replaced; nothing may use that."""
        c = self.config.checkpoint
        if c.enable:
            suffix = "damaged" if c.load_step < 0 else "old"
            set_aside(self.checkpointer.folder, self.job.resumed_at, suffix)

    def _go_back(self, good: int) -> None:
        """The watchdog's rollback: on from a checkpoint of step `good` or before, as if resumed."""
        self.checkpointer.wait()
        self.job = sent_back(self.job, good)
        self.recorder.metrics.close()
        self._resume()
        set_aside(self.checkpointer.folder, self.step, "old")
        self._start_recording()
        assert self.job.saved_state is not None
        self.watchdog.send_back(self.job.saved_state["watchdog"])
        # With the smaller steps: whoever resumes from it must not come by the same way again.
        self._save()
        self.recorder.clock.pop()  # the step's pauses are recorded already

    def _save(self, written: Callable[[], None] = lambda: None) -> None:
        state = {
            "format": STATE_FORMAT,
            "identity": self.job.identity,
            "validator": self.validator.state_dict() if self.validator else None,
            "recorder": self.recorder.metrics.state_dict(),
            "loader": self.job.loader.state_dict(),
            "pauses_due": self.pauses_due,
            "exported_at": self.exported_at,
            "skipped_in_a_row": self.skipped.in_a_row,
            "watchdog": self.watchdog.state_dict(),
        }
        with ExitStack() as phase:

            def is_written() -> None:
                phase.close()
                written()

            phase.enter_context(self._phase("checkpoint"))
            saved = self.checkpointer.save(self.step, state, is_written)
        self.saved_at = self.step
        if saved:
            verb = "writing" if self.config.checkpoint.async_mode == "async" else "wrote"
            logger.info("Checkpoint: %s %s/step-%s", verb, self.checkpointer.folder, self.step)

    def _export_folder(self) -> Path:
        return self.job.folder / "hf" / f"step-{self.step}"

    def _export(self) -> None:
        name, out, source = self.config.export.dtype, self._export_folder(), self.sources["student"]
        results = self.recorder.metrics.results(self.step)
        self.export_fault = None
        try:
            with self._phase("checkpoint"):
                export_hf(
                    self.student,
                    out,
                    source_folder=source.folder,
                    key_table=source.key_table,
                    dtype=None if name == "auto" else getattr(torch, name),
                    edits=source.edits,
                    card=model_card(self.config, self.step, results),
                )
            if dist.get_rank() == 0:
                link_latest(out)
            self.exported_at = self.step
            logger.info("Export: %s", out)
        except StorageError as error:
            # The next one may fit, and the checkpoint holds the weights; the last one has to.
            logger.error("Storage: %s", error)
            if self.step == self.total_steps:
                self.export_fault = error
