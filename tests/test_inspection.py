"""Ranks, the teacher's likeliest tokens and the texts of tokens in rollout files.

What a run writes is compared with the forward of transformers over the whole vocabulary.
`test_two_ranks` splits the vocabulary.
"""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_head import REF, TRUNCATED, WHOLE, Case, Problem, R, V, assert_close
from tiny_world import World, load_hf, make_model, make_world, read_rollouts, train
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opd_titan.data.pieces import TokenTexts
from opd_titan.distill import head
from opd_titan.distill.head import score_head
from opd_titan.distill.inspection import Columns, Inspector
from opd_titan.models.logits import Distribution

ROLES = ("student", "teacher", "reference")


# ------------------------------------------------------------------------- the head

PG = Case("policy_gradient", {**REF, "true_ratio": True})


def by_sorting(p: Problem, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rank, ids and log-probs of the k likeliest tokens of the whole vocabulary."""
    logits_RV = (p.hidden_TD[p.predict_R] @ p.weight_VD.t()).detach() / p.dist.temperature
    ranks = []
    for row, target in zip(logits_RV.tolist(), p.targets_R.tolist(), strict=True):
        ranks.append(1 + sorted(row, reverse=True).index(row[target]))
    values, ids = logits_RV.log_softmax(1).sort(dim=1, descending=True)
    return torch.tensor(ranks), ids[:, :k], values[:, :k]


def seen(p: Problem, monitor: Inspector, by: str = "scoring") -> Columns:
    if by == "scoring":
        score_head(p.hidden_TD, p.weight_VD, **p.where(), watch=monitor)
        return monitor.columns
    return p.loss(PG, watches={"student": monitor})[1].seen["student"]


@pytest.mark.parametrize("spans", [[slice(0, R)], [slice(1, 2), slice(4, R - 1)]], ids=str)
@pytest.mark.parametrize("dist", [WHOLE, Distribution(1.7)], ids=str)
@pytest.mark.parametrize("by", ["scoring", "update"])
def test_a_monitor_counts_as_sorting_does(
    monkeypatch: pytest.MonkeyPatch, by: str, dist: Distribution, spans: list[slice]
) -> None:
    for k, rows in product((0, 3, V + 4), (1, 3, 1000)):
        monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": rows * V * 4})
        p = Problem(dist)
        found = seen(p, Inspector(spans, k), by)
        truth = [torch.cat([column[s] for s in spans]) for column in by_sorting(p, k)]
        assert torch.equal(found[0], truth[0]) and torch.equal(found[1], truth[1])
        assert_close(found[2], truth[2])


@pytest.mark.parametrize("vocab", [1000, 1024])
def test_the_likeliest_tokens_of_a_large_vocabulary(vocab: int) -> None:
    p = Problem(vocab=vocab, teacher_vocab=vocab)
    _, ids_RK, values_RK = seen(p, Inspector([slice(0, R)], 5))
    _, true_ids_RK, true_values_RK = by_sorting(p, 5)
    assert torch.equal(ids_RK, true_ids_RK)
    assert_close(values_RK, true_values_RK)


@pytest.mark.parametrize("dist", TRUNCATED, ids=str)
def test_ranks_are_of_the_whole_vocabulary_if_samples_are_truncated(dist: Distribution) -> None:
    """Even a token that truncation removes has one: a data set's own responses have such tokens."""
    p = Problem(dist)
    ranks_R, *_ = seen(p, Inspector([slice(0, R)], 0), "update")
    assert torch.equal(ranks_R, by_sorting(p, 0)[0])


def test_equally_likely_tokens_share_the_best_rank() -> None:
    p = Problem()
    with torch.no_grad():
        p.weight_VD[:] = 0.0
    ranks_R, _, logprobs_RK = seen(p, Inspector([slice(0, R)], 2))
    assert ranks_R.tolist() == [1] * R
    assert_close(logprobs_RK, torch.full((R, 2), 1 / V).log())


def test_the_rank_is_0_if_the_log_prob_is_not_finite() -> None:
    p = Problem()
    with torch.no_grad():
        p.hidden_TD[p.predict_R[2]] = torch.nan
    ranks_R, *_ = seen(p, Inspector([slice(0, R)], 2))
    assert (ranks_R == 0).tolist() == [i == 2 for i in range(R)]


# ---------------------------------------------------------------------- the program

OPTIONS = """--reference.hf_path {folder}/other --reference.coef 0.5 --distill.minibatches 2
    --training.max_tokens_per_microbatch 90 --rollout.temperature 0.8 --rollout.top_k 20
    --metrics.sample_rollouts 5 --training.steps 2 --export.interval 1 --export.dtype float32
    --validation.enable False --checkpoint.enable False"""
EXACT = """--rollout.top_k 0 --distill.objective reverse_kl --rollout.on_policy_fraction 0.5
    --rollout.group_size 1"""
# Its first step makes the first of the two updates of "one"'s first step.
HALF = "--rollout.prompts_per_step 2 --distill.minibatches 1"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    make_model(world.folder / "other", seed=3)
    options = OPTIONS.format(folder=world.folder).split()
    assert train(world.argv("one", *options)) == 0
    assert train(world.argv("exact", *options, *EXACT.split())) == 0
    assert train(world.argv("half", *options, *HALF.split())) == 0
    return world


def hf_rows(folder: Path, row: dict[str, Any]) -> Tensor:
    """Return the log-probs [R, V] of transformers at the temperature of the run."""
    prompt, response = row["prompt_tokens"], row["response_tokens"]
    with torch.no_grad():
        logits = load_hf(folder)(torch.tensor([prompt + response])).logits[0]
    return (logits[len(prompt) - 1 : -1] / 0.8).log_softmax(-1)


def hf_ranks(logprobs_RV: Tensor, row: dict[str, Any]) -> list[int]:
    target_R1 = logprobs_RV.gather(1, torch.tensor(row["response_tokens"])[:, None])
    # No two are so near that rounding could swap them.
    gaps = (logprobs_RV - target_R1).abs().topk(2, dim=1, largest=False).values[:, 1]
    assert gaps.min() > 1e-5
    return (1 + (logprobs_RV > target_R1).sum(1)).tolist()


@pytest.mark.parametrize("run", ["one", "exact"])
def test_ranks_are_those_of_the_weights_at_the_update(world: World, run: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.teacher)
    steps = read_rollouts(world.folder / run)
    assert list(steps) == [1, 2]
    for step, rows in steps.items():
        student = world.student if step == 1 else world.folder / run / "hf" / "step-1"
        folders = dict(zip(ROLES, (student, world.teacher, world.folder / "other"), strict=True))
        assert len(rows) == (5 if run == "one" else 4)
        for i, row in enumerate(rows):
            if i == (4 if run == "one" else 2):  # the second update has another student
                del folders["student"]
            for role, folder in folders.items():
                assert row[f"{role}_ranks"] == hf_ranks(hf_rows(folder, row), row), role
            values_RK, ids_RK = hf_rows(world.teacher, row).topk(5, dim=1)
            texts = [[text for text, _ in top] for top in row["teacher_top"]]
            assert texts == [[tokenizer.decode([i]) for i in ids] for ids in ids_RK.tolist()]
            logprobs = torch.tensor([[value for _, value in top] for top in row["teacher_top"]])
            torch.testing.assert_close(logprobs, values_RK, rtol=1e-3, atol=1e-4)
            names = tokenizer.decode(row["response_tokens"])
            assert "".join(row["response_pieces"]) == names
            assert names.replace("<eos>", "") == row["response"]


def test_a_second_update_ranks_under_the_student_after_the_first(world: World) -> None:
    last = read_rollouts(world.folder / "one")[1][4]
    moved = world.folder / "half" / "hf" / "step-1"
    assert last["student_ranks"] == hf_ranks(hf_rows(moved, last), last)
    assert last["student_ranks"] != hf_ranks(hf_rows(world.student, last), last)


def test_the_data_sets_own_responses_are_inspected_too(world: World) -> None:
    rows = [row for rows in read_rollouts(world.folder / "exact").values() for row in rows]
    given = [row for row in rows if row["student_logprobs"] is None]
    assert 0 < len(given) < len(rows)
    assert all(len(row["student_ranks"]) == len(row["response_tokens"]) for row in given)


# ------------------------------------------------------------------- texts of tokens


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer without merges: each byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return one like SentencePiece: a space belongs to the next word; the first one is dropped."""
    words = ["<unk>", "\u2581the", "\u2581cat", "s"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.mark.parametrize(
    "text", ["plain", "caf\u00e9 \u20ac5", "\U0001f600\U0001f600", "\u65e5\u672c<|end|>"]
)
def test_a_character_of_several_tokens_belongs_to_the_last(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    pieces = TokenTexts(tokenizer).pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    assert [p for p in pieces if p] == (list(text) if "<" not in text else [*text[:2], "<|end|>"])


def test_bytes_that_are_no_character_are_shown_as_such() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("a\u20acb")["input_ids"]
    broken = [ids[0], *ids[1:3], ids[-1], *ids[1:3]]  # twice without its last byte
    pieces = TokenTexts(tokenizer).pieces(broken)
    assert "".join(pieces) == tokenizer.decode(broken)
    assert len(pieces) == len(broken) and pieces[0] == "a" and pieces[3].endswith("b")
    assert len(TokenTexts(tokenizer).pieces(ids[1:2] * 50)) == 50


def test_no_text_is_lost_beside_bytes_that_are_no_character() -> None:
    """For any bytes that a student writes, the joined pieces are its text."""
    tokenizer, rng = byte_tokenizer(), random.Random(0)
    euro, smile = tokenizer("\u20ac")["input_ids"], tokenizer("\U0001f600")["input_ids"]
    for _ in range(200):
        parts = [euro, smile, euro[:2], smile[:3], smile[:2], [rng.randrange(256)]]
        ids = [i for part in rng.choices(parts, k=rng.randrange(1, 12)) for i in part]
        pieces = TokenTexts(tokenizer).pieces(ids)
        assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids), ids


def test_spaces_between_words_are_kept() -> None:
    pieces = TokenTexts(word_tokenizer()).pieces([1, 2, 3, 1])
    assert pieces == ["the", " cat", "s", " the"]


def test_a_part_of_a_character_alone_has_its_name() -> None:
    tokenizer = byte_tokenizer()
    first = tokenizer("\u20ac")["input_ids"][0]
    texts = TokenTexts(tokenizer)
    assert texts.alone(first) == tokenizer.convert_ids_to_tokens(first)
    assert texts.alone(tokenizer("x")["input_ids"][0]) == "x"
    assert texts.alone(tokenizer.eos_token_id) == "<|end|>"


def test_pieces_of_the_real_tokenizer(qwen3: Any) -> None:
    text = "Th\u00e9 answer: \U0001f1eb\U0001f1f7 \u4f60\u597d \ud55c\n\n**42**<|im_end|>"
    ids = qwen3(text)["input_ids"]
    assert "".join(TokenTexts(qwen3).pieces(ids)) == text
