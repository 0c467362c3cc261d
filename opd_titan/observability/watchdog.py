"""Signs that a run goes wrong, while there is time to do something about it.

On-policy distillation dies in a few known ways, and within some thirty steps (StableOPD, arXiv
2604.08527; Rethinking OPD, arXiv 2604.13016). Each row of `SIGNS` is one of them: a figure of the
last steps beside the same figure at the start.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opd_titan.config import JobConfig
from opd_titan.errors import Fault

logger = logging.getLogger("opd_titan")

# Steps that a reading is the mean of. It is compared with step 1 alone, whose responses are of
# the student as it came: a run may be dead by step 5.
WINDOW = 5
# A run that was sent back so often does not need a smaller learning rate.
MOST_ROLLBACKS = 3
SLOWER = 0.5
# Same weights, same code: between rollout and update only the order of additions differs, and the
# rounding of half precision, where the largest of a million differences is far out.
LARGEST_GAP = {torch.float32: 4e-3, torch.bfloat16: 1.0}

Readings = Mapping[str, float]


@dataclass(frozen=True)
class Limits:
    """What a run allows: `gap` between log-probs of rollout and update, in nats; whether responses
    are expected to end."""

    gap: float
    ends: bool


@dataclass(frozen=True)
class Sign:
    """One way to die.

    shows: (readings now, readings at the start, limits) to whether it does. A reading that the run
        does not have is a KeyError, and no sign.
    figures: the scalars that `shows` reads, and a message names.
    cause: what it most likely comes from.
    remedy: the options to change.
    """

    name: str
    shows: Callable[[Readings, Readings, Limits], bool]
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
        "the student has found loops, which look likely to the teacher too",
        "lower optimizer.lr, set reference.coef to about 0.1, or mix in the data set's responses "
        "(rollout.on_policy_fraction)",
    ),
    Sign(
        "ever more responses are cut off",
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
        "responses run away in length",
        lambda now, start, limits: (
            limits.ends
            and now["rollout/response_tokens_mean"] > 2.0 * start["rollout/response_tokens_mean"]
            # A teacher that writes more is followed, and comes nearer.
            and now["kl/student_teacher"] > 0.9 * start["kl/student_teacher"]
        ),
        ("rollout/response_tokens_mean", "kl/student_teacher"),
        "the student learns to go on where it should end",
        "check that teacher and student end with the same token; lower optimizer.lr, or limit "
        "rollout.max_new_tokens to where the teacher's answers end",
    ),
    Sign(
        "entropy has collapsed away from the teacher",
        lambda now, start, limits: (
            now["policy/entropy"] < 0.1 * start["policy/entropy"]
            and now["kl/student_teacher"] > max(0.05, 0.5 * start["kl/student_teacher"])
        ),
        ("policy/entropy", "kl/student_teacher"),
        "the student is certain of what the teacher would not say",
        "lower optimizer.lr, set distill.log_ratio_clamp to about 10, or choose "
        'distill.objective = "forward_kl" or "jsd"',
    ),
    Sign(
        "no response ends",
        lambda now, start, limits: limits.ends and now["rollout/eos_fraction"] == 0.0,
        ("rollout/eos_fraction", "rollout/response_tokens_mean"),
        "the student does not know its stop token, or has no room to come to it",
        "check eos_token_id in its generation_config.json and data.template; fine-tune first "
        '(distill.objective = "sft"), or raise rollout.max_new_tokens',
    ),
    Sign(
        "the student leaves what the teacher could say",
        lambda now, start, limits: now["kl/p99"] > max(8.0, 2.0 * start["kl/p99"]),
        ("kl/p99", "kl/student_teacher"),
        "one token in a hundred is one that the teacher all but excludes, and there its scores "
        "teach little",
        "lower optimizer.lr, set reference.coef to about 0.1, or start from a student that was "
        'fine-tuned on the teacher\'s answers (distill.objective = "sft")',
    ),
    Sign(
        "the student moves away from the teacher",
        lambda now, start, limits: (
            # One step's estimate may be negative: that is noise, and no distance to double.
            now["kl/student_teacher"] > 2.0 * max(0.0, start["kl/student_teacher"]) + 0.1
        ),
        ("kl/student_teacher",),
        "steps are too large, or too noisy, to go downhill",
        "lower optimizer.lr, raise rollout.prompts_per_step, or choose "
        'distill.objective = "reverse_kl", which has no sampling noise in its tokens',
    ),
    Sign(
        "log-probs of rollout and update drift apart",
        lambda now, start, limits: now["policy/logprob_gap_max"] > limits.gap,
        ("policy/logprob_gap_max",),
        "the two compute different things: weights have grown beyond the precision, or a kernel is "
        "wrong",
        'training.dtype = "float32" tells which; then lower optimizer.lr or report it',
    ),
)

# The scalars that signs are read from.
READ = sorted({name for sign in SIGNS for name in sign.figures})


class Watchdog:
    """Reads each step's scalars, says once what goes wrong, and does what `action` says.

    Attributes:
        slowdown: factor of the learning rate; halved each time the run is sent back.
        sent_back: how often it was.
    """

    def __init__(self, config: JobConfig, dtype: torch.dtype) -> None:
        self.action = config.watchdog.action
        self.limits = Limits(LARGEST_GAP.get(dtype, 1.0), ends=not config.rollout.ignore_eos)
        self.slowdown, self.sent_back = 1.0, 0
        self._start: Readings = {}
        self._last: deque[Readings] = deque(maxlen=WINDOW)
        self._showing: set[str] = set()

    def look_at(self, step: int, scalars: Readings) -> int | None:
        """Take in a step. All ranks call with the same scalars.

        Returns:
            Where the run is to go back to, this step or an earlier one; None to go on.

        Raises:
            Fault: it is to stop.
        """
        if self.action == "off":
            return None
        own = {k: scalars[k] for k in READ if k in scalars and math.isfinite(scalars[k])}
        # Each from the first step that has it: mixed with the data set's responses
        # (rollout.on_policy_fraction), a step may have none of the student's.
        self._start = {**own, **self._start}
        self._last.append(own)
        new = self._new_signs() if len(self._last) == WINDOW else []
        for sign in new:
            logger.warning("Watchdog: step %s: %s", step, self._describe(sign))
        if not new or self.action == "warn":
            return None
        if self.action == "stop" or self.sent_back == MOST_ROLLBACKS:
            times = f" after {self.sent_back} rollbacks" if self.sent_back else ""
            text = self._describe(new[0])
            raise Fault(f"watchdog: step {step}: {text}; stopped{times} (watchdog.action)")
        return self._last_good(step, new)

    def _new_signs(self) -> list[Sign]:
        now = _means(self._last)
        shown = [sign for sign in SIGNS if self._shows(sign, now)]
        new = [sign for sign in shown if sign.name not in self._showing]
        self._showing = {sign.name for sign in shown}
        return new

    def _shows(self, sign: Sign, now: Readings) -> bool:
        try:
            return sign.shows(now, self._start, self.limits)
        except KeyError:  # this run has no such figure: no teacher, no sampling
            return False

    def _describe(self, sign: Sign) -> str:
        now = _means(self._last)
        figures = ", ".join(
            f"{name} is {now[name]:.3g}, was {self._start[name]:.3g}" for name in sign.figures
        )
        return f"{sign.name} ({figures} at the start): {sign.cause}; {sign.remedy}"

    def _last_good(self, step: int, signs: Sequence[Sign]) -> int:
        """The newest step of the window from whose weights no response with these signs came."""
        before = step - len(self._last)  # whose weights sampled the window's first responses
        for reading in self._last:
            if any(self._shows(sign, reading) for sign in signs):
                break
            before += 1
        return before - 1

    def send_back(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave at a checkpoint, with smaller steps than last time."""
        slowdown, sent_back = self.slowdown * SLOWER, self.sent_back + 1
        self.load_state_dict(state)
        # What the checkpoint knows of earlier rollbacks is older than what this one does.
        self.slowdown, self.sent_back = slowdown, sent_back
        logger.warning(
            "Watchdog: rollback %s of at most %s: from here on with %g of optimizer.lr",
            self.sent_back,
            MOST_ROLLBACKS,
            self.slowdown,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "slowdown": self.slowdown,
            "sent_back": self.sent_back,
            "start": self._start,
            "last": list(self._last),
            "showing": sorted(self._showing),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.slowdown, self.sent_back = state["slowdown"], state["sent_back"]
        self._start = state["start"]
        self._last = deque(state["last"], maxlen=WINDOW)
        self._showing = set(state["showing"])


def _means(readings: Iterable[Readings]) -> dict[str, float]:
    """Of each scalar, over the steps that have it."""
    values: dict[str, list[float]] = {}
    for step in readings:
        for name, value in step.items():
            values.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}
