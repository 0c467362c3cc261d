"""The trainer: load, then loop over rollout, scores and update; validate, save, export."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
import torch.distributed as dist

from opd_titan.config.resolve import ResolvedJob
from opd_titan.distributed.heartbeat import Heartbeat, set_phase
from opd_titan.distributed.monitor import Monitor
from opd_titan.distributed.stopping import Stopped, StopRequest
from opd_titan.distributed.world import set_timeout
from opd_titan.errors import OneLineError
from opd_titan.observability.console import report_job
from opd_titan.observability.watchdog import Watchdog
from opd_titan.training.models import build_generator, compute_dtype, load_models
from opd_titan.training.nonfinite import NonfiniteUpdates
from opd_titan.training.phases import Phases
from opd_titan.training.recording import log_new_graphs, make_profiler, make_recorder
from opd_titan.training.saving import Saver
from opd_titan.training.self_check import probe, report
from opd_titan.training.setup import Start, roll_back, set_up

logger = logging.getLogger("opd_titan")


class Trainer:
    """One distillation job. The constructor checks everything before it loads any weight."""

    def __init__(self, job: ResolvedJob, stop: StopRequest, heartbeat: Heartbeat) -> None:
        self.job, self.config, self.stop = job, job.config, stop
        self.setup, self.start = set_up(job)
        self.world, self.validator = self.setup.world, self.setup.validator
        self.monitor = Monitor(stop, heartbeat, self.world)
        torch.use_deterministic_algorithms(self.config.training.deterministic)
        self.models = load_models(job, self.setup.sources, self.world, stop)
        self.phases = Phases(job, self.world, self.models, self.monitor)
        self.saver = Saver(self.setup, self.models)
        self.nonfinite = NonfiniteUpdates(
            self.config.training.max_skipped_updates,
            job.folder,
            self.setup.decode,
            self.setup.grade,
        )
        self.watchdog = Watchdog(job)
        self.step, self.total_steps = 0, self.setup.total_steps
        self.graphs = 0  # compiled up to now
        # What the last step still needs: any of "validate", "export", "record" and "checkpoint".
        self.pending: set[str] = set()

    def train(self) -> int:
        """Run the job until it ends or a signal stops it. Return the exit code (`train.main`)."""
        report_job(self.job, self.total_steps, self.models.student, self.models.frozen)
        c = self.config
        self._resume(self.start, "damaged" if c.checkpoint.load_step < 0 else "old")
        if self.start.state is not None:
            self.watchdog.load_state_dict(self.start.state["watchdog"])
            self.pending = set(self.start.state["pending"])
        # Loading is over. From here on, a rank may wait for others as long as a rollout takes.
        set_timeout(c.comm.train_timeout_seconds, self.world.device)
        self.monitor.heartbeat.limit = c.comm.train_timeout_seconds
        stopped = False
        try:
            self._before_first_step()
            with make_profiler(self.setup, self.step) as profiler:
                while self.step < self.total_steps:
                    last_good = self.train_step()
                    if last_good is None:
                        self.after_step()
                    else:
                        self._roll_back(last_good)
                    profiler.step()
        except Stopped:
            stopped = True
        except OneLineError:  # on all ranks
            # The save under way may be the only checkpoint.
            self.saver.checkpoints.wait()
            raise
        return self._finish(stopped)

    # -------------------------------------------------------------------- step

    def train_step(self) -> int | None:
        """Do one step: prompts, rollout, scores, update.

        Returns:
            The last good step, if the watchdog asks for a rollback; otherwise None.

        Raises:
            Stopped: a signal came before the weights changed; the step has not been done.
        """
        phase, phases, models = self._phase, self.phases, self.models
        position = self.setup.loader.state_dict()
        self.step += 1
        try:
            with phase("step"):
                with phase("data"):
                    self.stop.check()
                    prompts = next(self.setup.loader)
                with phase("sync"):
                    if self.job.on_policy:
                        models.weights.sync()
                with phase("rollout"):
                    samples = phases.rollout(self.step, prompts, self.setup.given_response)
                    self.recorder.choose(samples)
                    models.memory.make_room(models.weights, models.generator)
                plan = phases.plan(samples)
                with phase("teacher"):
                    for role in self.job.teachers:
                        phases.score(role, plan)
                with phase("reference"):
                    if "reference" in models.frozen:
                        phases.score("reference", plan)
                with phase("update"):
                    rate = self.watchdog.slowdown * self.setup.learning_rate(self.step)
                    result = phases.update(plan, rate)
                    models.weights.mark_stale()
                    room = models.kept.usable - models.kept.needed
                    models.memory.measure(any(result.made), room)
        except Stopped:
            self.step -= 1
            self.setup.loader.load_state_dict(position)
            raise
        stats = asdict(models.generator.stats)
        scalars = self.recorder.record(self.step, samples, result.scalars, **stats)
        self.nonfinite.check(self.step, result)
        return self.watchdog.observe(self.step, scalars)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        set_phase(f"phase {name} of step {self.step}")
        with self.recorder.clock.phase(name):
            yield

    # --------------------------------------------------- between steps, at the end

    def _before_first_step(self) -> None:
        if self.job.teachers:
            set_phase("the comparison of rollout and training")
            self.models.weights.sync()
            prompts, seed = self.setup.prompt_sets[0].prompts, self.config.training.seed
            student, generator = self.models.student, self.models.generator
            found = probe(student, generator, prompts, self.phases.sampling, seed, self.world)
            report(found, compute_dtype(self.job))
        if self.validator is not None and self.step == 0:
            with self._phase("validate"):
                for role in self.job.teachers:
                    self._measure_teacher(role)
                scalars = self._validate()
            self.recorder.record_pauses(0, scalars)
        if self.start.state is not None and self.step == self.total_steps:
            # The export failed or was deleted, or this was not the last step of the earlier run.
            if not self.saver.has_exported(self.step):
                self.pending |= {"export", "checkpoint"}
        self._do_pending()

    def after_step(self) -> None:
        """Validate, export and save a checkpoint, as far as they are due after a step."""
        if self.job.compiled:
            self.graphs = log_new_graphs(self.step, self.graphs)
        c, last = self.config, self.step == self.total_steps

        def due(interval: int) -> bool:
            return last or (interval > 0 and self.step % interval == 0)

        self.pending = {"record"}
        if self.validator is not None and due(c.validation.interval):
            self.pending.add("validate")
        if due(c.export.interval):
            self.pending.add("export")
        if c.checkpoint.enable and due(c.checkpoint.interval):
            self.pending.add("checkpoint")
        self._do_pending()

    def _do_pending(self) -> None:
        """Do the pending parts of the step.

        Raises:
            Stopped: a signal came; the validation and all later parts are still pending.
        """
        found: dict[str, float] = {}
        if "validate" in self.pending and self.validator is not None:
            with self._phase("validate"):
                found = self._validate()
        # Before the checkpoint: a run that is killed in between exports again when it resumes.
        if "export" in self.pending:
            self._export()
        done, self.pending = self.pending, set()
        if "checkpoint" in done:
            self._save()
        if "record" in done:
            # Before the checkpoint is published: a run killed in between would never record this.
            self.recorder.record_pauses(self.step, found)
        self.saver.checkpoints.poll()

    def _validate(self) -> dict[str, float]:
        assert self.validator is not None
        self.models.weights.sync()
        generator, on_tokens = self.models.generator, self.monitor.on_tokens
        scalars = self.validator.measure_student(generator, self.step, on_tokens)
        generator.release()  # its KV cache is sized for the validation
        self.recorder.metrics.validated(self.step, scalars)  # for the next export or checkpoint
        return scalars

    def _measure_teacher(self, role: str) -> None:
        assert self.validator is not None
        if role not in (s.teacher for s in self.validator.sets):
            return
        # Two copies of weights at once would be the memory peak of the whole run.
        self.models.weights.release()
        self.models.generator.release()
        source, model = self.setup.sources[role], self.models.frozen[role]
        weights, generator = build_generator(
            self.job, source, model, source.eos_ids, self.world, self.models.memory
        )
        weights.sync()
        self.validator.measure_teacher(generator, role, self.monitor.on_tokens)
        del weights, generator
        gc.collect()  # a compiled block refers to itself

    def _export(self) -> None:
        with self._phase("checkpoint"):
            results = self.recorder.metrics.results(self.step)
            self.saver.export(self.step, results, required=self.step == self.total_steps)

    def _finish(self, stopped: bool) -> int:
        saves = self.config.checkpoint.enable
        # Compare with the newest complete checkpoint: a later attempt may have failed.
        if stopped and saves and self.step > 0:
            if self.saver.checkpoints.secured() != self.step:
                self._save()
        self.recorder.metrics.close()
        self.saver.finish()
        dist.barrier()  # a rank that leaves early breaks the last collective of the others
        if not stopped:
            self.recorder.report_outcome(self.step)
            return 0
        outcome = "with a complete checkpoint; start again to continue"
        if self.step == 0:
            outcome = "before there was anything to save; start again"
        if not saves:
            outcome = "and nothing was saved, because checkpoint.enable is false"
        signal = self.stop.signal
        logger.warning("Stopped by signal %s after step %s %s", signal, self.step, outcome)
        return 75 if saves else 1

    # ------------------------------------------------------------------- state

    def _save(self) -> None:
        """Write a checkpoint, or start to in background mode. `poll` or `finish` publishes it."""
        # If parts of the step are pending, so is its final checkpoint. Without that one, each run
        # that resumes from here would do and record the same parts again.
        pending = self.pending | {"checkpoint"} if self.pending else set()
        state = {
            "validator": self.validator.state_dict() if self.validator else None,
            "recorder": self.recorder.metrics.state_dict(),
            "loader": self.setup.loader.state_dict(),
            "pending": sorted(pending),
            "skipped_in_a_row": self.nonfinite.in_a_row,
            "watchdog": self.watchdog.state_dict(),
        }
        with self._phase("checkpoint"):
            self.saver.save(self.step, state)

    def _resume(self, start: Start, suffix: str) -> None:
        """Load the checkpoint to start from, if any, and record from there on.

        Args:
            suffix: see `Saver.load`.
        """
        if start.state is not None:
            set_phase(f"the loading of the checkpoint of step {start.step}")
        self.saver.load(start, suffix)
        self.step, state = start.step, start.state
        self.recorder = make_recorder(self.setup, self.step, self.phases.rule)
        if state is None:
            return
        self.nonfinite.in_a_row = state["skipped_in_a_row"]
        self.recorder.metrics.load_state_dict(state["recorder"])
        if self.validator is not None:
            self.validator.load_state_dict(state["validator"])

    def _roll_back(self, last_good: int) -> None:
        """Continue from a checkpoint of step `last_good` or before, with a lower learning rate."""
        self.saver.checkpoints.wait()
        start = roll_back(self.setup, last_good)
        self.recorder.metrics.close()
        self._resume(start, "old")
        assert start.state is not None
        self.watchdog.roll_back(start.state["watchdog"])
        # Save the smaller learning rate, for a run that resumes from here.
        self._save()
        self.saver.checkpoints.poll()
        self.recorder.clock.pop()  # the pauses of this step have been recorded
