"""Ranks, the teacher's alternatives and the texts of tokens in rollout files.

What a run writes is compared with transformers' own forward over the whole vocabulary.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_head import DISTRIBUTIONS, SETTINGS, WHOLE, Problem, R, V
from tiny_world import World, load_hf, make_model, make_world, read_rollouts, train, train_on
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opd_titan.data.pieces import TokenTexts
from opd_titan.distill import head
from opd_titan.distill.head import loss_head, score_head
from opd_titan.distill.inspection import Columns, Monitor
from opd_titan.distill.objectives import policy_gradient
from opd_titan.models.logits import Distribution

ROLES = ("student", "teacher", "reference")
NEW_KEYS = {f"{role}_ranks" for role in ROLES} | {"response_pieces", "teacher_top"}


# ------------------------------------------------------------------------- the head


def by_sorting(p: Problem, dist: Distribution, k: int) -> tuple[Tensor, Tensor, Tensor]:
    logits_RV = (p.hidden_TD[p.predict_R] @ p.weight_VD.t()).detach() / dist.temperature
    logprobs_RV = logits_RV.log_softmax(1)
    ranks = []
    for row, target in zip(logits_RV.tolist(), p.targets_R.tolist(), strict=True):
        ranks.append(1 + sorted(row, reverse=True).index(row[target]))
    values, ids = logprobs_RV.sort(dim=1, descending=True)
    return torch.tensor(ranks), ids[:, :k], values[:, :k]


def scored(p: Problem, dist: Distribution, watch: Monitor) -> Columns:
    score_head(p.hidden_TD, p.weight_VD, p.predict_R, p.targets_R, dist, watch)
    return watch.columns


def updated(p: Problem, dist: Distribution, watch: Monitor) -> Columns:
    where = {"predict_R": p.predict_R, "targets_R": p.targets_R, "scores": p.scores}
    rule = {"objective": policy_gradient, "settings": SETTINGS, "dist": dist}
    _, stats = loss_head(
        p.hidden_TD, p.weight_VD, **where, **rule, scale=1.0, watches={"student": watch}
    )
    return stats.seen["student"]


@pytest.mark.parametrize("spans", [[slice(0, R)], [slice(1, 2), slice(4, R - 1)]], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("dist", [d for d in DISTRIBUTIONS if not d.truncates], ids=str)
@pytest.mark.parametrize("k", [0, 3, V + 4])
@pytest.mark.parametrize("look", [scored, updated])
def test_a_watch_counts_as_sorting_does(
    monkeypatch: pytest.MonkeyPatch,
    look: Any,
    k: int,
    dist: Distribution,
    rows: int,
    spans: list[slice],
) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": rows * V * 4})
    p = Problem()
    found = look(p, dist, Monitor(spans, k))
    truth = [torch.cat([column[s] for s in spans]) for column in by_sorting(p, dist, k)]
    assert torch.equal(found[0], truth[0])
    assert torch.equal(found[1], truth[1])
    torch.testing.assert_close(found[2], truth[2], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("vocab", [1000, 1024])
def test_the_likeliest_tokens_of_a_large_vocabulary(vocab: int) -> None:
    p = Problem()
    with torch.no_grad():
        wide_VD = torch.randn(vocab, p.weight_VD.shape[1])
    watch = Monitor([slice(0, R)], 5)
    score_head(p.hidden_TD, wide_VD, p.predict_R, p.targets_R, WHOLE, watch)
    logprobs_RV = (p.hidden_TD[p.predict_R] @ wide_VD.t()).detach().log_softmax(1)
    values_RK, ids_RK = logprobs_RV.topk(5, dim=1)
    assert torch.equal(watch.columns[1], ids_RK)
    torch.testing.assert_close(watch.columns[2], values_RK, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dist", [d for d in DISTRIBUTIONS if d.truncates], ids=str)
def test_ranks_are_of_the_whole_vocabulary_whatever_samples_are_cut_to(dist: Distribution) -> None:
    """Of tokens that would have been cut, too: a data set's own responses have them."""
    p = Problem()
    ranks_R, *_ = updated(p, dist, Monitor([slice(0, R)], 0))
    assert torch.equal(ranks_R, by_sorting(p, dist, 0)[0])


def test_equally_likely_tokens_share_the_best_rank() -> None:
    p = Problem()
    with torch.no_grad():
        p.weight_VD[:] = 0.0
    ranks_R, _, logprobs_RK = scored(p, WHOLE, Monitor([slice(0, R)], 2))
    assert ranks_R.tolist() == [1] * R
    torch.testing.assert_close(logprobs_RK, torch.full((R, 2), 1 / V).log())


def test_a_rank_among_numbers_that_are_not_finite_is_none() -> None:
    p = Problem()
    with torch.no_grad():
        p.hidden_TD[p.predict_R[2]] = torch.nan
    ranks_R, *_ = scored(p, WHOLE, Monitor([slice(0, R)], 2))
    assert (ranks_R == 0).tolist() == [i == 2 for i in range(R)]


# ---------------------------------------------------------------------- the program

OPTIONS = """--reference.hf_path {folder}/other --reference.coef 0.5 --distill.minibatches 2
    --training.max_tokens_per_microbatch 90 --rollout.temperature 0.8 --rollout.top_k 20
    --metrics.sample_rollouts 5 --training.steps 2 --export.interval 1 --export.dtype float32
    --validation.enable False --checkpoint.enable False"""
EXACT = """--rollout.top_k 0 --distill.objective reverse_kl --rollout.on_policy_fraction 0.5
    --rollout.group_size 1"""
# Its first step is the first of the two updates that the others' first step makes.
HALF = "--rollout.prompts_per_step 2 --distill.minibatches 1"
LAYOUTS = {
    "fsdp": "--parallelism.data_parallel_shard_degree 2",
    "tp": "--parallelism.tensor_parallel_degree 2",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    make_model(world.folder / "other", seed=3)
    options = OPTIONS.format(folder=world.folder).split()
    assert train(world.argv("one", *options)) == 0
    assert train(world.argv("exact", *options, *EXACT.split())) == 0
    assert train(world.argv("half", *options, *HALF.split())) == 0
    train_on(2, [world.argv(name, *options, *more.split()) for name, more in LAYOUTS.items()])
    return world


def hf_rows(folder: Path, row: dict[str, Any]) -> Tensor:
    """transformers' log-probs [R, V] at the temperature of the run."""
    prompt, response = row["prompt_tokens"], row["response_tokens"]
    with torch.no_grad():
        logits = load_hf(folder)(torch.tensor([prompt + response])).logits[0]
    return (logits[len(prompt) - 1 : -1] / 0.8).log_softmax(-1)


def hf_ranks(logprobs_RV: Tensor, row: dict[str, Any]) -> list[int]:
    target_R1 = logprobs_RV.gather(1, torch.tensor(row["response_tokens"])[:, None])
    # Nobody's neighbour is so near that rounding could swap the two, or this would be flaky.
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
            if i == (4 if run == "one" else 2):  # of the second update: the student has moved
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


def test_a_second_update_ranks_under_the_student_that_the_first_one_left(world: World) -> None:
    last = read_rollouts(world.folder / "one")[1][4]
    moved = world.folder / "half" / "hf" / "step-1"
    assert last["student_ranks"] == hf_ranks(hf_rows(moved, last), last)
    assert last["student_ranks"] != hf_ranks(hf_rows(world.student, last), last)


def test_the_data_sets_own_responses_are_inspected_too(world: World) -> None:
    rows = [row for rows in read_rollouts(world.folder / "exact").values() for row in rows]
    given = [row for row in rows if row["student_logprobs"] is None]
    assert 0 < len(given) < len(rows)
    assert all(len(row["student_ranks"]) == len(row["response_tokens"]) for row in given)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_write_what_one_does(world: World, layout: str) -> None:
    one, two = (read_rollouts(world.folder / name) for name in ("one", layout))
    assert one.keys() == two.keys()
    for step, rows in one.items():
        assert len(rows) == len(two[step])
        for row, other in zip(rows, two[step], strict=True):
            exact = NEW_KEYS - {"teacher_top"} | {"response_tokens"}
            assert {key: row[key] for key in exact} == {key: other[key] for key in exact}
            for top, others in zip(row["teacher_top"], other["teacher_top"], strict=True):
                assert [text for text, _ in top] == [text for text, _ in others]
                assert [v for _, v in top] == pytest.approx([v for _, v in others], abs=1e-3)


def test_without_a_reference_its_ranks_are_null(world: World) -> None:
    assert train(world.argv("plain", "--training.steps", 1, "--validation.enable", False)) == 0
    rows = read_rollouts(world.folder / "plain")[1]
    assert all(row["reference_ranks"] is None and row["teacher_ranks"] for row in rows)


# ------------------------------------------------------------------- texts of tokens


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, as where a byte-level BPE knows no merge; one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece does, a space is part of the word after it, and the first one is dropped."""
    words = ["<unk>", "\u2581the", "\u2581cat", "s"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.mark.parametrize(
    "text", ["plain", "caf\u00e9 \u20ac5", "\U0001f600\U0001f600", "\u65e5\u672c<|end|>"]
)
def test_a_character_of_several_tokens_is_its_last_ones(text: str) -> None:
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
    """Whatever bytes a student that is falling apart writes, joined the pieces are its text."""
    tokenizer, rng = byte_tokenizer(), random.Random(0)
    euro, smile = tokenizer("\u20ac")["input_ids"], tokenizer("\U0001f600")["input_ids"]
    for _ in range(500):
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
