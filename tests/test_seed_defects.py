"""One test for each defect of the prototype ("the seed") that this project grew from.

Each states the seed's formula as `seed_version`, the truth by hand, and an example on which the
seed is wrong and we are right.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_utils import lone_world, run_distributed
from tiny_student import (
    CPU,
    LargestTensor,
    all_responses,
    make_sample,
    naive_kept,
    naive_logprobs,
    one_process_group,
    random_samples,
    response_logits,
    tiny_qwen3,
    with_rollout_logprobs,
)
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from opd_titan.data.loader import PromptLoader
from opd_titan.data.prompts import build_prompts
from opd_titan.data.tokenizer import load_tokenizer
from opd_titan.data.types import Prompt, Sample
from opd_titan.distill import head
from opd_titan.distill.objectives import ObjectiveSettings, policy_gradient, sft
from opd_titan.distill.packing import pack, plan_minibatches
from opd_titan.distill.update import UpdateRule, update
from opd_titan.distributed.world import ALONE, build_world
from opd_titan.models.logits import Distribution
from opd_titan.rollout.generator import Generator, SamplingParams
from opd_titan.rollout.rollout import sample_responses
from opd_titan.rollout.scheduler import Request

STOP = 0


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with one_process_group():
        yield


def gradient(model, samples: list[Sample], objective=policy_gradient, dist_=None) -> Tensor:
    """Of one whole update, all samples in one micro-batch: SGD at a rate of 1 subtracts it."""
    model = copy.deepcopy(model)
    before = weights(model)
    rule = UpdateRule(objective, ObjectiveSettings(), dist_ or Distribution(), max_grad_norm=0.0)
    plan = plan_minibatches(samples, 1, 1 << 20, ALONE)
    update(model, torch.optim.SGD(model.parameters(), lr=1.0), plan, rule, lone_world())
    return before - weights(model)


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient_of(loss: Tensor, model) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def differ(a: Tensor, b: Tensor) -> bool:
    return ((a - b).norm() > 0.05 * b.norm()).item()


def same(a: Tensor, b: Tensor) -> bool:
    return ((a - b).norm() <= 1e-4 * b.norm()).item()


# ---------------------------------------------------------------- the loss


def test_advantages_do_not_leak_into_other_sequences() -> None:
    """The seed's (B, 1, T) advantages met (B, T) ratios: each token got its column's sum."""

    def seed_version(logprobs_BT: Tensor, advantages_BT: Tensor) -> Tensor:
        ratio_BT = (logprobs_BT - logprobs_BT.detach()).exp()
        terms = ratio_BT * advantages_BT.unsqueeze(1)
        assert terms.shape == (2, 2, 3)
        return -terms.sum() / logprobs_BT.numel()

    model = tiny_qwen3()
    samples = with_rollout_logprobs(model, random_samples([(2, 3), (4, 3)]))
    samples[1].teacher_logprobs = samples[1].student_logprobs.clone()  # nothing to learn here
    logprobs_BT = torch.stack([naive_logprobs(model, s) for s in samples])
    advantages_BT = torch.stack([s.teacher_logprobs - s.student_logprobs for s in samples])
    truth = gradient_of(-(advantages_BT[0] * logprobs_BT[0]).sum() / 6, model)

    assert same(gradient(model, samples), truth)
    logprobs_BT = torch.stack([naive_logprobs(model, s) for s in samples])
    assert differ(gradient_of(seed_version(logprobs_BT, advantages_BT), model), truth)
    for s, advantage_T in zip(samples, advantages_BT, strict=True):
        gradient(model, samples)
        torch.testing.assert_close(s.advantages, advantage_T, rtol=1e-4, atol=1e-5)


def seed_targets(ids: list[int], prompt_len: int, keep_T: Tensor) -> list[int]:
    """What the seed trained: log-probs stand at the predicting index (the last is padded), the
    mask at the token's own."""
    mask_T = (torch.arange(len(ids)) >= prompt_len) & keep_T
    predicted = [*ids[1:], None]
    return [predicted[i] for i in mask_T.nonzero().flatten().tolist() if predicted[i] is not None]


def test_the_first_generated_token_is_trained() -> None:
    prompt, response = [5, 6, 7], [8, 9, 1]
    everything = torch.ones(6, dtype=torch.bool)
    assert seed_targets(prompt + response, 3, everything) == [9, 1]
    assert pack([make_sample(prompt, response)], lone_world()).targets_R.tolist() == [8, 9, 1]

    # A response of one token: the seed learns nothing at all from it.
    assert seed_targets([5, 6, 7, 8], 3, everything[:4]) == []
    model = tiny_qwen3()
    sample = make_sample(prompt, [8])
    truth = gradient_of(-naive_logprobs(model, sample).sum(), model)
    assert truth.norm() > 0.1
    assert same(gradient(model, [sample], sft), truth)


def test_the_stop_token_is_trained_though_it_is_the_pad_token() -> None:
    """The seed's mask was `token != pad`, and Qwen3-Base pads with its stop token."""

    def seed_version(ids: list[int], prompt_len: int) -> list[int]:
        """With the shift above put right, which leaves this defect to be seen."""
        own_T = (torch.tensor(ids) != STOP) & (torch.arange(len(ids)) >= prompt_len)
        return torch.tensor(ids)[own_T].tolist()

    prompt, response = [5, 6], [8, 9, STOP]
    assert seed_version(prompt + response, 2) == [8, 9]
    assert pack([make_sample(prompt, response)], lone_world()).targets_R.tolist() == [8, 9, STOP]

    # The teacher differs from the student in the stop token alone: it would stop here.
    model = tiny_qwen3()
    (sample,) = with_rollout_logprobs(model, [make_sample(prompt, response)])
    sample.teacher_logprobs = sample.student_logprobs + torch.tensor([0.0, 0.0, 1.5])
    truth = gradient_of(-1.5 * naive_logprobs(model, sample)[2] / 3, model)
    assert same(gradient(model, [sample]), truth)
    # One id more or less that looks like padding changes no count: it is a token.
    batch = pack([make_sample([STOP, 5], [STOP, STOP])], lone_world())
    assert batch.targets_R.tolist() == [STOP, STOP] and batch.predict_R.tolist() == [1, 2]


@pytest.mark.parametrize("dist_", [Distribution(1.0, 3, 1.0), Distribution(0.8, 0, 0.7)], ids=str)
def test_what_is_scored_is_what_was_sampled_from(dist_: Distribution) -> None:
    """The seed sampled with the checkpoint's top-k and top-p and scored the full softmax."""

    def seed_version(model, sample: Sample) -> Tensor:
        return naive_logprobs(model, sample, dist_.temperature)

    model = tiny_qwen3(5)
    prompt = Prompt(0, "", (3, 1))
    requests = [Request(prompt, i, i) for i in range(300)]
    params = SamplingParams(1, dist_.temperature, dist_.top_p, dist_.top_k)
    samples = Generator(model, {STOP}).generate(requests, params)

    with torch.no_grad():
        logits_V = response_logits(model, make_sample((3, 1), (0,)))[0] / dist_.temperature
    kept_V = naive_kept(logits_V[None], dist_.top_k, dist_.top_p)[0]
    truth_V = logits_V.masked_fill(~kept_V, -torch.inf).log_softmax(0)
    assert 1 < kept_V.sum() < 5
    tokens = [s.response_ids[0] for s in samples]
    share_V = torch.bincount(torch.tensor(tokens), minlength=5) / 300
    assert (share_V - truth_V.exp()).abs().max() < 0.1  # 3 standard deviations
    assert set(tokens) == set(kept_V.nonzero().flatten().tolist())
    for s in samples:
        assert s.student_logprobs.item() == pytest.approx(
            truth_V[s.response_ids[0]].item(), abs=1e-5
        )
        with torch.no_grad():
            assert (s.student_logprobs - seed_version(model, s)).abs().item() > 0.05

    # A teacher that says exactly what is sampled leaves nothing to learn, in expectation; scored
    # by the full softmax, every token would look underrated and be pushed up.
    expected, seed_expected = 0.0, 0.0
    for (token,) in all_responses(5, STOP, 1):
        if not kept_V[token]:
            continue
        s = make_sample((3, 1), (token,), teacher_logprobs=truth_V[[token]])
        chance = truth_V[token].exp()
        expected += chance * gradient(model, [s], dist_=dist_)
        with torch.no_grad():
            advantage = truth_V[token] - seed_version(model, s)[0]
        assert advantage > 0.05
        seed_expected += chance * gradient_of(-advantage * seed_version(model, s)[0], model)
    assert expected.norm() < 1e-5 < 0.01 < seed_expected.norm()


# ---------------------------------------------------------------- who does what


def prompts(count: int) -> list[Prompt]:
    return [Prompt(i, "", (1 + i % 7, 2, 3 + i % 5)) for i in range(count)]


def roll_out_on_one_process_nodes() -> dict[str, Any]:
    """Every rank is the first of its node, as with one process on each of several nodes."""
    os.environ["LOCAL_RANK"] = "0"
    local_rank = int(os.environ["LOCAL_RANK"])
    seed_version = DistributedSampler(
        range(8), num_replicas=dist.get_world_size(), rank=local_rank, shuffle=False
    )
    loader = PromptLoader([prompts(40)], prompts_per_step=8, seed=0)
    batch = [next(loader) for _ in range(3)][-1]
    sampled: list[int] = []
    samples = sample_responses(
        Generator(tiny_qwen3(), {STOP}),
        batch,
        2,
        SamplingParams(6),
        (0, 1),
        build_world(CPU).dp,
        sampled.append,
    )
    return {
        "seed": [batch[i].index for i in seed_version],
        "batch": [p.index for p in batch],
        "samples": [(s.prompt.index, s.sample_index, s.response_ids) for s in samples],
        "sampled": sum(sampled),
    }


def test_ranks_share_the_data_by_their_global_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed's sampler took the local rank, the same on every node."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    alone = roll_out_on_one_process_nodes()
    nodes = run_distributed(roll_out_on_one_process_nodes, 2)
    assert nodes[0]["seed"] == nodes[1]["seed"]  # half of the prompts twice, half never
    assert set(nodes[0]["seed"]) < set(alone["batch"])

    for node in nodes:
        assert node["batch"] == alone["batch"]
        assert node["samples"] == alone["samples"]
        assert 0 < node["sampled"] < alone["sampled"]
    keys = [(index, i) for index, i, _ in alone["samples"]]
    assert keys == [(index, i) for index in alone["batch"] for i in range(2)]
    # Each token was sampled by one rank alone.
    assert sum(node["sampled"] for node in nodes) == alone["sampled"]
    assert alone["sampled"] == sum(len(ids) for *_, ids in alone["samples"])


# ---------------------------------------------------------------- OpenThoughts prompts


def seed_prompt(row: dict[str, Any], tokenizer: Any) -> str:
    """The seed rendered the whole conversation, masked for SFT, and sampled on after it."""
    roles = {"human": "user", "gpt": "assistant", "assistant": "assistant"}
    turns = [{"role": roles[t["from"]], "content": t["value"]} for t in row["conversations"]]
    return tokenizer.apply_chat_template(turns, tokenize=False)


def check_openthoughts_prompts(file: Path, tokenizer: Any) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for template in ("raw", "chat"):
        found = build_prompts(
            dataset="openthoughts3",
            path=str(file),
            split="train",
            template=template,
            enable_thinking=True,
            max_prompt_tokens=10**6,
            tokenizer=tokenizer,
            keep_responses=True,
        )
        assert found.prompts
        for p in found.prompts:
            question, trace = (turn["value"] for turn in rows[p.index]["conversations"][:2])
            # The trace ends in the answer; the question must not have been cut instead.
            assert question.strip() in p.text
            shown = (p.text, tokenizer.decode(p.token_ids))
            for secret in (trace, trace.split("</think>")[-1].strip()):
                assert all(secret not in text for text in shown)
                assert secret in seed_prompt(rows[p.index], tokenizer)
            assert p.response == trace  # kept beside the prompt, for SFT


def test_openthoughts_prompts_hold_no_answer(tmp_path: Path) -> None:
    conversation = [
        {"from": "human", "value": "What is 6 times 7?"},
        {"from": "gpt", "value": "<think>6*7=42</think>\nThe answer is \\boxed{42}."},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"conversations": conversation, "source": "x"}) + "\n")
    check_openthoughts_prompts(file, tiny_tokenizer())


def test_openthoughts_prompts_hold_no_answer_on_real_rows(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "qwen3_tokenizer", "student.hf_path")
    check_openthoughts_prompts(shared_data / "openthoughts3_fixture.jsonl", tokenizer)


# ---------------------------------------------------------------- memory


def test_no_full_vocabulary_tensor_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed held [batch, time, vocabulary] log-probs of all three models."""
    vocab, rows = 3000, 8
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": rows * vocab * 4})
    model = tiny_qwen3(vocab)
    samples = random_samples([(60, 20), (40, 70), (30, 30)], vocab)
    response_tokens = 120
    rule = UpdateRule(policy_gradient, ObjectiveSettings(), Distribution(), 1.0)
    plan = plan_minibatches(samples, 1, 1 << 20, ALONE)
    optimizer = torch.optim.AdamW(model.parameters())
    with LargestTensor() as largest:
        update(model, optimizer, plan, rule, lone_world())
    with LargestTensor() as seed_version:
        torch.stack([naive_logprobs(model, s).sum() for s in samples]).sum().backward()
    embedding = vocab * model.args.dim
    assert largest.numel == max(rows * vocab, embedding)
    assert largest.numel < response_tokens * vocab / 7
    assert seed_version.numel >= 110 * vocab  # the longest sequence alone, prompt and all
