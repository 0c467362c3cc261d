"""What it saves to pack a group's prompt once in an update, and how much padding there is.

    python benchmarks/packing.py                      # lengths drawn like GSM8K's
    python benchmarks/packing.py --data gsm8k/train.jsonl --tokenizer path/to/qwen3 --dry

The update is a forward and a backward of the student (no optimizer); shared and repeated prompts
take turns. --dry only counts tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from harness import Record, alternate, emit, machine, ratio, spread, table
from torch.nn.functional import cross_entropy

from opd_titan.data.types import Prompt, Sample
from opd_titan.distill.packing import pack, plan_minibatches
from opd_titan.distributed.world import ALONE, Axis, World
from opd_titan.models.qwen3.args import Qwen3Args
from opd_titan.models.qwen3.model import Qwen3Model

WORLD = World(torch.device("cpu"), None, ALONE, ALONE)
VOCAB = 4096
Lengths = list[tuple[int, list[int]]]  # of each prompt, and of its responses


def vary(mean: float, group: int, rng: random.Random) -> list[int]:
    return [max(20, round(mean * rng.lognormvariate(0.0, 0.25))) for _ in range(group)]


def like_gsm8k(prompts: int, group: int, rng: random.Random) -> Lengths:
    """Draw prompts of about 100 tokens, responses of about 150."""
    means = [rng.lognormvariate(4.95, 0.3) for _ in range(prompts)]
    return [(max(40, round(rng.lognormvariate(4.57, 0.3))), vary(m, group, rng)) for m in means]


def like_debug(prompts: int, group: int, rng: random.Random) -> Lengths:
    """Draw the debug recipe's: problems of a line, answers of a few tokens."""
    return [
        (rng.randint(6, 14), [rng.randint(3, 14) for _ in range(group)]) for _ in range(prompts)
    ]


def of_gsm8k(path: str, tokenizer: str, prompts: int, group: int, rng: random.Random) -> Lengths:
    """Return questions in Qwen3's chat template, and responses about as long as the answers."""
    from transformers import AutoTokenizer

    encoder = AutoTokenizer.from_pretrained(tokenizer)
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    found: Lengths = []
    for row in rng.sample(rows, prompts):
        turn = [{"role": "user", "content": row["question"]}]
        text = encoder.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        answer = len(encoder.encode(row["answer"]))
        found.append((len(encoder.encode(text)), vary(answer, group, rng)))
    return found


def both_ways(lengths: Lengths, rng: random.Random) -> dict[str, list[Sample]]:
    """Return samples with random tokens, with the prompts of a group shared and repeated."""

    def ids(n: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(n)]

    prompts = [Prompt(i, "", tuple(ids(p))) for i, (p, _) in enumerate(lengths)]
    shared = [
        Sample(prompt, n, ids(r), "stop")
        for prompt, (_, responses) in zip(prompts, lengths, strict=True)
        for n, r in enumerate(responses)
    ]
    own = [replace(s, prompt=replace(s.prompt, index=i)) for i, s in enumerate(shared)]
    return {"shared": shared, "repeated": own}


def model_of(dim: int) -> Qwen3Model:
    torch.manual_seed(0)
    sizes = dict(dim=dim, n_layers=4, n_heads=dim // 64, n_kv_heads=dim // 128, head_dim=64)
    rest = dict(norm_eps=1e-6, rope_theta=1e6, tied=True, max_seq_len=4096, init_std=0.02)
    model = Qwen3Model(Qwen3Args(vocab_size=VOCAB, ffn_dim=3 * dim, **sizes, **rest))
    for p in model.parameters():
        torch.nn.init.ones_(p) if p.dim() == 1 else torch.nn.init.normal_(p, std=0.02)
    return model


def seconds_of_update(model: Qwen3Model, samples: list[Sample], budget: int) -> float:
    start = time.perf_counter()
    for microbatch in plan_minibatches(samples, 1, budget, ALONE)[0].microbatches:
        batch = pack(microbatch, WORLD)
        hidden_TD = model(batch.tokens_T, batch.attend)
        logits_RV = hidden_TD[batch.predict_R] @ model.lm_head.weight.t()
        cross_entropy(logits_RV, batch.targets_R).backward()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def count_tokens(samples: list[Sample], budget: int, ranks: int) -> Record:
    """Return the tokens that layers process on all ranks, and the padding of attention."""
    plans = [plan_minibatches(samples, 1, budget, Axis(r, ranks))[0] for r in range(ranks)]
    batches = [pack(m, WORLD) for plan in plans for m in plan.microbatches if m]
    # Rows that a shared prompt continues are counted with those that they continue.
    real = padded = 0
    for attend in (batch.attend for batch in batches):
        padded += len(attend._padding[1])
        begun = set(attend.continues)
        real += sum(len(rows) for i, rows in enumerate(attend._rows) if i not in begun)
    return {
        "layers": sum(len(b.tokens_T) for b in batches),
        "padding of attention %": 100 * (padded / real - 1),
        "stand-ins": sum(not m for plan in plans for m in plan.microbatches),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="gsm8k's train.jsonl")
    parser.add_argument("--tokenizer", help="folder of Qwen3's tokenizer, for --data")
    parser.add_argument("--dims", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--prompts", type=int, default=2, help="of the timed update")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    emit(machine())
    rng = random.Random(0)
    draw = partial(of_gsm8k, a.data, a.tokenizer) if a.data else like_gsm8k
    many = both_ways(draw(128, 8, rng), rng)
    rows = [
        {"128 prompts x 8": name, "ranks": ranks, **count_tokens(samples, a.budget, ranks)}
        for ranks in (1, 8)
        for name, samples in many.items()
    ]
    print(table(rows))
    if a.dry:
        return
    cases = {"gsm8k": draw(a.prompts, 8, rng), "debug": like_debug(64, 2, rng)}
    timed = []
    for dim in a.dims:
        model = model_of(dim)
        for name, lengths in cases.items():
            ways = both_ways(lengths, rng)
            tokens = {way: len(pack(samples, WORLD).tokens_T) for way, samples in ways.items()}
            runs = {w: partial(seconds_of_update, model, s, a.budget) for w, s in ways.items()}
            found = alternate(runs, a.rounds, warmup=1)
            row: Record = {"width": dim, "lengths": name}
            row |= {f"{way}, s": spread(values)["median"] for way, values in found.items()}
            row["ratio"] = ratio(found["repeated"], found["shared"])
            row["tokens saved"] = f"{1 - tokens['shared'] / tokens['repeated']:.0%}"
            timed.append(row)
    print(table(timed))


if __name__ == "__main__":
    main()
