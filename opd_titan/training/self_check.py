"""Compare the log-probs of rollout, scoring and update on the real weights, before step 1."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from opd_titan.data.types import Prompt
from opd_titan.distill.head import LossHead, LossRule
from opd_titan.distill.objectives import ObjectiveSettings, sft
from opd_titan.distill.packing import STAND_IN, pack, plan_minibatches
from opd_titan.distill.scoring import score
from opd_titan.distill.vocabulary import TokenScores
from opd_titan.distributed.collectives import max_scalar, sum_scalars
from opd_titan.distributed.sharding import resharding
from opd_titan.distributed.world import World
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.rollout import sample_responses

logger = logging.getLogger("opd_titan")

PROBE_PROMPTS, PROBE_TOKENS = 4, 16
# Same weights, same code, fp32: only the order of additions differs. Half precision rounds more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}


@torch.no_grad()
def probe(
    student: nn.Module,
    generator: Generator,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    seed: int,
    world: World,
) -> dict[str, float]:
    """Use the student as its own teacher on a few sampled tokens.

    Returns:
        "kl": mean log S - log T with the student as teacher; 0 except for rounding.
        "gap": the largest |rollout - update| log-prob of one token.
    """
    short = replace(params, max_new_tokens=min(PROBE_TOKENS, params.max_new_tokens), max_tokens=0)
    samples = sample_responses(generator, prompts[:PROBE_PROMPTS], 1, short, (seed, 0), world.dp)
    plan = plan_minibatches(samples, 1, 1 << 30, world.dp)
    as_teacher = {
        s.prompt.index: values for s, values in score(student, plan, params.distribution, world)
    }
    rule = LossRule(sft, ObjectiveSettings(), params.distribution)
    tokens, difference, gaps = 0, 0.0, [0.0]
    with resharding(student):
        for microbatch in plan[0].microbatches:
            batch = pack(microbatch or STAND_IN, world)
            head = LossHead(rule, batch.predict_R, batch.targets_R, TokenScores(), scale=1.0)
            _, stats = student(batch.tokens_T, batch.attend, head)
            if microbatch:
                update_R = stats.logprob_R.cpu()
                logprobs = [s.student_logprobs for s in microbatch]
                rollout_R = torch.cat([x for x in logprobs if x is not None])
                tokens += update_R.numel()
                teacher_R = torch.cat([as_teacher[s.prompt.index] for s in microbatch])
                difference += (update_R - teacher_R).double().sum().item()
                gaps.append((update_R - rollout_R).abs().max().item())
    total = sum_scalars({"tokens": tokens, "difference": difference}, world.device, world.dp)
    gap = torch.tensor(gaps).max().item()  # Python's max may lose a NaN
    return {"kl": total["difference"] / total["tokens"], "gap": max_scalar(gap, world.device)}


def report(result: dict[str, float], dtype: torch.dtype) -> None:
    """Log the result, and warn if two code paths disagree."""
    logger.info(
        "Self-check: student as its own teacher: KL %.1e; rollout and update log-probs differ by "
        "at most %.1e",
        result["kl"],
        result["gap"],
    )
    limit = TOLERANCE.get(dtype, 0.25)
    # Negated, so that NaN fails too.
    if not (abs(result["kl"]) <= limit and result["gap"] <= limit):
        logger.warning(
            "Self-check: more than %.0e in %s: log-probs of rollout, scoring and update are not "
            "comparable on this machine; try training.dtype float32",
            limit,
            str(dtype).removeprefix("torch."),
        )
