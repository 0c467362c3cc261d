"""What packing a group's prompt once saves in an update, and how much padding there is.

    python benchmarks/packing.py                      # lengths drawn like GSM8K's
    python benchmarks/packing.py --data gsm8k/train.jsonl --tokenizer path/to/qwen3 --dry

The update is a forward and a backward of the student (no optimizer), shared against not, back to
back in turns; --dry prints shares of tokens alone.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from opd_titan.data.types import Prompt, Sample  # noqa: E402
from opd_titan.distill.packing import pack, plan_minibatches  # noqa: E402
from opd_titan.distributed.world import ALONE, Axis, World  # noqa: E402
from opd_titan.models.qwen3.args import Qwen3Args  # noqa: E402
from opd_titan.models.qwen3.model import Qwen3Model  # noqa: E402

WORLD = World(torch.device("cpu"), None, ALONE, ALONE)
VOCAB = 4096
Lengths = list[tuple[int, list[int]]]


def like_gsm8k(prompts: int, group: int, rng: random.Random) -> Lengths:
    """Prompts of about 100 tokens, responses of about 150."""
    found: Lengths = []
    for _ in range(prompts):
        mean = rng.lognormvariate(4.95, 0.3)
        responses = [max(20, round(mean * rng.lognormvariate(0.0, 0.25))) for _ in range(group)]
        found.append((max(40, round(rng.lognormvariate(4.57, 0.3))), responses))
    return found


def like_debug(prompts: int, group: int, rng: random.Random) -> Lengths:
    """The debug recipe: problems of a line, answers of a few tokens more."""
    return [
        (rng.randint(6, 14), [rng.randint(3, 14) for _ in range(group)]) for _ in range(prompts)
    ]


def of_gsm8k(path: str, tokenizer: str, prompts: int, group: int, rng: random.Random) -> Lengths:
    """Questions in Qwen3's chat template, and for a group its answer's length, varied as above."""
    from transformers import AutoTokenizer

    encoder = AutoTokenizer.from_pretrained(tokenizer)
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    found: Lengths = []
    for row in rng.sample(rows, prompts):
        turn = [{"role": "user", "content": row["question"]}]
        text = encoder.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        answer = len(encoder.encode(row["answer"]))
        responses = [max(20, round(answer * rng.lognormvariate(0.0, 0.25))) for _ in range(group)]
        found.append((len(encoder.encode(text)), responses))
    return found


def samples_of(lengths: Lengths, rng: random.Random) -> list[Sample]:
    def ids(n: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(n)]

    prompts = [Prompt(i, "", tuple(ids(p))) for i, (p, _) in enumerate(lengths)]
    return [
        Sample(prompt, n, ids(r), "stop")
        for prompt, (_, responses) in zip(prompts, lengths, strict=True)
        for n, r in enumerate(responses)
    ]


def apart(samples: list[Sample]) -> list[Sample]:
    """The same, every prompt an own one."""
    return [replace(s, prompt=replace(s.prompt, index=i)) for i, s in enumerate(samples)]


def model_of(dim: int) -> Qwen3Model:
    torch.manual_seed(0)
    sizes = dict(dim=dim, n_layers=4, n_heads=dim // 64, n_kv_heads=dim // 128, head_dim=64)
    rest = dict(norm_eps=1e-6, rope_theta=1e6, tied=True, max_seq_len=4096, init_std=0.02)
    model = Qwen3Model(Qwen3Args(vocab_size=VOCAB, ffn_dim=3 * dim, **sizes, **rest))
    for p in model.parameters():
        torch.nn.init.ones_(p) if p.dim() == 1 else torch.nn.init.normal_(p, std=0.02)
    return model


def update(model: Qwen3Model, samples: list[Sample], budget: int) -> None:
    for microbatch in plan_minibatches(samples, 1, budget, ALONE)[0].microbatches:
        batch = pack(microbatch, WORLD)
        hidden_TD = model(batch.tokens_T, batch.attend)
        logits_RV = hidden_TD[batch.predict_R] @ model.lm_head.weight.t()
        cross_entropy(logits_RV, batch.targets_R).backward()
    model.zero_grad(set_to_none=True)


def seconds(runs: list[Callable[[], None]], rounds: int) -> list[float]:
    """Medians, taken in turns after a round to warm up."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for run, found in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if turn:
                found.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def tokens_of(samples: list[Sample], budget: int, ranks: int) -> dict[str, float]:
    """What all ranks process: by layers, by attention with its padding, and as stand-ins."""
    plans = [plan_minibatches(samples, 1, budget, Axis(r, ranks))[0] for r in range(ranks)]
    batches = [[pack(m, WORLD) for m in p.microbatches if m] for p in plans]
    per_rank = [sum(len(b.tokens_T) for b in of_rank) for of_rank in batches]
    attends = [b.attend for of_rank in batches for b in of_rank]
    padded = sum(len(a._padding[1]) for a in attends)
    begun = [{c for c in a.continues if c is not None} for a in attends]
    real = sum(
        len(rows)
        for a, b in zip(attends, begun, strict=True)
        for i, rows in enumerate(a._rows)
        if i not in b
    )
    return {
        "layers": sum(per_rank),
        "padding of attention %": 100 * (padded / real - 1),
        "stand-ins": sum(not m for p in plans for m in p.microbatches),
        "micro-batches": sum(len(p.microbatches) for p in plans),
        "idle %": 100 * (1 - sum(per_rank) / ranks / max(per_rank)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="gsm8k's train.jsonl")
    parser.add_argument("--tokenizer", help="folder of Qwen3's tokenizer, for --data")
    parser.add_argument("--dims", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--prompts", type=int, default=2, help="of the timed update")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=int, default=16384)
    parser.add_argument("--case", nargs="*", default=["gsm8k", "debug"])
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(2)
    rng = random.Random(0)
    draw = like_gsm8k
    if args.data:
        draw = partial(of_gsm8k, args.data, args.tokenizer)
    many = samples_of(draw(128, 8, rng), rng)
    for ranks in (1, 8):
        for name, samples in (("shared", many), ("apart", apart(many))):
            found = tokens_of(samples, args.budget, ranks)
            text = ", ".join(f"{key} {value:,.1f}" for key, value in found.items())
            print(f"128 prompts x 8, {ranks} ranks, {name}: {text}")
    if args.dry:
        return
    cases = {"gsm8k": draw(args.prompts, 8, rng), "debug": like_debug(64, 2, rng)}
    for dim in args.dims:
        model = model_of(dim)
        for name in args.case:
            shared = samples_of(cases[name], rng)
            both = (shared, apart(shared))
            saved = 1 - cost_of(both[0]) / cost_of(both[1])
            fast, slow = seconds(
                [partial(update, model, s, args.budget) for s in both], args.rounds
            )
            print(
                f"hidden {dim}, {name}: {fast:.3f} s shared, {slow:.3f} s apart, "
                f"{slow / fast:.2f} x; {100 * saved:.0f} % of the tokens saved"
            )


def cost_of(samples: list[Sample]) -> int:
    return len(pack(samples, WORLD).tokens_T)


if __name__ == "__main__":
    main()
