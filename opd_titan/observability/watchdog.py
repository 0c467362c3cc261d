"""Detect that a run is collapsing, early enough to react.

On-policy distillation collapses in a few known ways, within about thirty steps (StableOPD, arXiv
2604.08527; Rethinking OPD, arXiv 2604.13016). Each row of `SIGNS` describes one of them: it
compares the scalars of the last steps with the same scalars at the start.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_titan.config.resolve import ResolvedJob
from opd_titan.errors import Fault

logger = logging.getLogger("opd_titan")

# The mean of this many steps is compared with step 1, which has the responses of the initial
# student. A longer start would include the damage, because a run may collapse by step 5.
WINDOW = 5
MAX_ROLLBACKS = 3  # after this many, a smaller learning rate does not help
SLOWDOWN = 0.5  # factor of the learning rate at each rollback
# Largest difference, in nats, between a token's log-probs in rollout and update. With the same
# weights and code they differ only by rounding: in half precision, the difference is as large as
# this for about one token in a million.
MAX_GAP = {"float32": 4e-3, "bfloat16": 1.0}

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Limits:
    """Limits that depend on the run.

    Attributes:
        gap: in nats, see `MAX_GAP`.
        ends: whether responses can end before they are cut.
    """

    gap: float
    ends: bool


@dataclass(frozen=True)
class Sign:
    """A sign of one way in which a run collapses.

    Attributes:
        shows: (figures now, figures at the start, limits) -> whether the run has the sign.
        figures: the scalars that `shows` reads and the message quotes.
        cause: the most likely cause.
        remedy: the options to change.
    """

    name: str
    shows: Callable[[Figures, Figures, Limits], bool]
    figures: tuple[str, ...]
    cause: str
    remedy: str


SIGNS = (
    Sign(
        "responses repeat themselves",
        lambda now, start, limits: (
            now["rollout/repetition"] > max(0.5, start["rollout/repetition"] + 0.2)
        ),
        ("rollout/repetition",),
        "the student writes loops, and inside a loop the teacher expects it to continue",
        "lower optimizer.lr, set reference.coef to about 0.1, or mix in the data set's responses "
        "(rollout.on_policy_fraction)",
    ),
    Sign(
        "more and more responses are cut off",
        lambda now, start, limits: (
            limits.ends
            and now["rollout/truncated_fraction"]
            > max(0.5, start["rollout/truncated_fraction"] + 0.25)
        ),
        ("rollout/truncated_fraction",),
        "responses no longer end",
        "lower optimizer.lr; if the teacher's answers are that long, raise rollout.max_new_tokens",
    ),
    Sign(
        "responses become much longer",
        lambda now, start, limits: (
            limits.ends
            and now["rollout/response_tokens_mean"] > 2.0 * start["rollout/response_tokens_mean"]
            # If the student only learns the teacher's longer answers, the KL falls.
            and now["kl/student_teacher"] > 0.9 * start["kl/student_teacher"]
        ),
        ("rollout/response_tokens_mean", "kl/student_teacher"),
        "the student learns to continue where it should end",
        "check that teacher and student end with the same token; lower optimizer.lr, or limit "
        "rollout.max_new_tokens to the length of the teacher's answers",
    ),
    Sign(
        "entropy has collapsed away from the teacher",
        lambda now, start, limits: (
            now["policy/entropy"] < 0.1 * start["policy/entropy"]
            and now["kl/student_teacher"] > max(0.05, 0.5 * start["kl/student_teacher"])
        ),
        ("policy/entropy", "kl/student_teacher"),
        "the student is certain of tokens that are unlikely under the teacher",
        "lower optimizer.lr, set distill.log_ratio_clamp to about 10, or choose "
        'distill.objective = "forward_kl" or "jsd"',
    ),
    Sign(
        "no response ends",
        lambda now, start, limits: limits.ends and now["rollout/eos_fraction"] == 0.0,
        ("rollout/eos_fraction", "rollout/response_tokens_mean"),
        "the student does not know its stop token, or is cut off before it",
        "check eos_token_id in its generation_config.json and data.template; fine-tune first "
        '(distill.objective = "sft"), or raise rollout.max_new_tokens',
    ),
    Sign(
        "the student samples tokens that the teacher almost excludes",
        lambda now, start, limits: now["kl/p99"] > max(8.0, 2.0 * start["kl/p99"]),
        ("kl/p99", "kl/student_teacher"),
        "one token in a hundred is almost impossible under the teacher, where its scores do not "
        "help",
        "lower optimizer.lr, set reference.coef to about 0.1, or start from a student that was "
        'fine-tuned on the teacher\'s answers (distill.objective = "sft")',
    ),
    Sign(
        "the student moves away from the teacher",
        lambda now, start, limits: (
            # The estimate of one step may be negative because of noise.
            now["kl/student_teacher"] > 2.0 * max(0.0, start["kl/student_teacher"]) + 0.1
        ),
        ("kl/student_teacher",),
        "the steps are too large or too noisy to reduce the loss",
        "lower optimizer.lr, raise rollout.prompts_per_step, or choose "
        'distill.objective = "reverse_kl", which has no sampling noise in its tokens',
    ),
    Sign(
        "log-probs of rollout and update drift apart",
        lambda now, start, limits: now["policy/logprob_gap_max"] > limits.gap,
        ("policy/logprob_gap_max",),
        "rollout and update compute different log-probs: the weights are too large for the "
        "precision, or a kernel is wrong",
        'if it disappears with training.dtype = "float32", lower optimizer.lr; otherwise report it',
    ),
)

_READ = {name for sign in SIGNS for name in sign.figures}


class Watchdog:
    """Read each step's scalars, report a sign when it appears, and perform watchdog.action.

    Attributes:
        slowdown: factor of the learning rate.
        rollbacks: number of rollbacks so far.
    """

    def __init__(self, job: ResolvedJob) -> None:
        self.action = job.config.watchdog.action
        self.limits = Limits(MAX_GAP[job.dtype], ends=not job.config.rollout.ignore_eos)
        self.slowdown, self.rollbacks = 1.0, 0
        self._start: Figures = {}
        self._last: deque[Figures] = deque(maxlen=WINDOW)
        self._showing: list[str] = []  # names of signs that the run still has, all reported

    def observe(self, step: int, scalars: Figures) -> int | None:
        """Check the scalars of a step. All ranks call with the same scalars.

        Returns:
            The newest step that the run may return to, or None to continue.

        Raises:
            Fault: the run must stop.
        """
        if self.action == "off":
            return None
        figures = {n: v for n, v in scalars.items() if n in _READ and math.isfinite(v)}
        # Compare each figure with the first step that has it: with rollout.on_policy_fraction below
        # 1, step 1 may have no samples of the student.
        self._start = {**figures, **self._start}
        self._last.append(figures)
        if len(self._last) < WINDOW:
            return None
        now = _means(self._last)
        shown = [sign for sign in SIGNS if self._shows(sign, now)]
        new = [sign for sign in shown if sign.name not in self._showing]
        self._showing = [sign.name for sign in shown]
        messages = [self._message(sign, now) for sign in new]
        for message in messages:
            logger.warning("Watchdog: step %s: %s", step, message)
        if not new or self.action == "warn":
            return None
        if self.action == "stop" or self.rollbacks == MAX_ROLLBACKS:
            times = f" after {self.rollbacks} rollbacks" if self.rollbacks else ""
            raise Fault(f"watchdog: step {step}: {messages[0]}; stopped{times} (watchdog.action)")
        return self._last_good(step, new)

    def _shows(self, sign: Sign, now: Figures) -> bool:
        known = now.keys() & self._start.keys()
        return known.issuperset(sign.figures) and sign.shows(now, self._start, self.limits)

    def _message(self, sign: Sign, now: Figures) -> str:
        figures = ", ".join(f"{n} is {now[n]:.3g}, was {self._start[n]:.3g}" for n in sign.figures)
        return f"{sign.name} ({figures} at the start): {sign.cause}; {sign.remedy}"

    def _last_good(self, step: int, signs: Sequence[Sign]) -> int:
        """Return the newest step with weights that sampled responses without these signs."""
        bad = (any(self._shows(sign, figures) for sign in signs) for figures in self._last)
        first_bad = next((i for i, found in enumerate(bad) if found), len(self._last))
        # The weights of step n sample the responses of step n + 1.
        return step - len(self._last) + first_bad - 1

    def roll_back(self, state: dict[str, Any]) -> None:
        """Restore the `state_dict` of a checkpoint, with a smaller learning rate than now."""
        # A checkpoint from before an earlier rollback does not include that rollback.
        slowdown, rollbacks = self.slowdown * SLOWDOWN, self.rollbacks + 1
        self.load_state_dict({**state, "slowdown": slowdown, "rollbacks": rollbacks})
        logger.warning(
            "Watchdog: rollback %s of at most %s: continuing with %g times optimizer.lr",
            self.rollbacks,
            MAX_ROLLBACKS,
            self.slowdown,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "slowdown": self.slowdown,
            "rollbacks": self.rollbacks,
            "start": self._start,
            "last": list(self._last),
            "showing": self._showing,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.slowdown, self.rollbacks = state["slowdown"], state["rollbacks"]
        self._start, self._showing = state["start"], state["showing"]
        self._last = deque(state["last"], maxlen=WINDOW)


def _means(steps: Iterable[Figures]) -> dict[str, float]:
    """Return the mean of each scalar over the steps that have it."""
    values: dict[str, list[float]] = defaultdict(list)
    for figures in steps:
        for name, value in figures.items():
            values[name].append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}
