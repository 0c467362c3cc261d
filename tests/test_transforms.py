"""Activation checkpointing and compilation save memory and time and change no number.

Shapes: T packed tokens, L layers.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_utils import lone_world, run_distributed
from tiny_rollout import ARGS, CPU, EOS, FAMILY, prompts, requests, summary, tiny
from tiny_student import one_process_group, random_samples
from tiny_world import (
    World as Files,
)
from tiny_world import (
    make_world,
    read_rollouts,
    read_scalars,
    read_weights,
    start,
    train,
)
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from opd_titan.distill.packing import plan_minibatches
from opd_titan.distill.scoring import score
from opd_titan.distributed.world import World, build_world
from opd_titan.models import transforms
from opd_titan.models.attention import PackedAttention
from opd_titan.models.logits import Distribution
from opd_titan.models.qwen3.model import Qwen3Model
from opd_titan.rollout.generator import Generator, SamplingParams

MODES = ("none", "selective", "full")
# Even, for tensor parallelism; not the width (32) or another size of the model.
VOCAB = 62
# Two, one, and as many tokens as the model's width, a head's size and the vocabulary; one sequence
# and several.
SHAPES = [[5, 3], [1], [32], [8], [62], [1, 1], [2, 2], [7, 1, 9], [16], [4], [40, 40], [1], [3]]
# All sizes differ from the student's.
TEACHER = {"dim": 64, "n_heads": 8, "head_dim": 16, "ffn_dim": 80, "n_layers": 3}

needs_cpp = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile on the CPU needs a C++ compiler: no g++ here"
)


def make(
    world: World, mode: str = "none", compile: bool = False, *, seed: int = 0, **sizes: Any
) -> Qwen3Model:
    model = tiny(seed, vocab_size=VOCAB, **sizes).requires_grad_(True)
    FAMILY.parallelize(model, world, torch.float32, activation_checkpoint=mode, compile=compile)
    return model


def forward(model: Qwen3Model, seq_lens: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(seq_lens))
    tokens_T = torch.randint(VOCAB, (sum(seq_lens),), generator=generator)
    return model(tokens_T, PackedAttention(seq_lens, CPU), lambda h_TD, _w: h_TD.square().sum())


def gradients(model: Qwen3Model, seq_lens: list[int]) -> dict[str, Tensor]:
    """Return the loss, and the gradient of every parameter by name."""
    model.zero_grad()
    loss = forward(model, seq_lens)
    loss.backward()
    found = {"loss": loss.detach()}
    for name, p in model.named_parameters():
        if p.grad is not None:
            found[name] = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
    return found


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the largest difference, relative to the largest entry of its tensor.

    A token that attends to itself alone has gradients of q and k that are only rounding, which
    differs between CPUs: below a millionth of the largest gradient it is relative to that one.
    """
    assert a.keys() == b.keys()
    tops = {name: entries.abs().max().item() for name, entries in a.items()}
    largest = max(top for name, top in tops.items() if name != "loss")
    scales = {name: top if top > 1e-6 * largest else largest for name, top in tops.items()}
    return max((a[name] - b[name]).abs().max().item() / scales[name] for name in a)


@pytest.fixture
def world() -> Iterator[World]:
    with one_process_group():
        yield lone_world(init_device_mesh("cpu", (1,), mesh_dim_names=("dp_shard",)))


# ------------------------------------------------------------------ checkpointing


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_checkpointing_does_not_change_gradients(world: World, tied: bool) -> None:
    models = {mode: make(world, mode, tied=tied) for mode in MODES}
    for seq_lens in ([5, 3, 20], [1]):
        found = {mode: gradients(model, seq_lens) for mode, model in models.items()}
        assert len(found["none"]) > 20
        assert all(difference(found["none"], found[mode]) == 0.0 for mode in MODES)


def plain_model(mode: str, compile: bool = False, **sizes: Any) -> Qwen3Model:
    """Return a model that is not sharded: its forward allocates only activations."""
    model = tiny(vocab_size=VOCAB, **sizes).requires_grad_(True)
    transforms.apply_activation_checkpointing(model.layers, mode)
    if compile:
        transforms.apply_compile(model.layers)
    return model


def kept_bytes(model: Qwen3Model, seq_lens: list[int]) -> int:
    """Return the bytes that a forward leaves allocated for its backward."""
    forward(model, seq_lens).backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = forward(model, seq_lens)
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiler.events())


def test_checkpointing_keeps_less() -> None:
    per_token = {}
    for mode in MODES:
        one, two = (kept_bytes(plain_model(mode, n_layers=n), [64, 64]) for n in (2, 3))
        per_token[mode] = (two - one) / 128 / 4  # floats of one layer more
    # "full" keeps of a layer only its input.
    assert per_token["full"] == ARGS.dim
    heads = (ARGS.n_heads + 2 * ARGS.n_kv_heads) * ARGS.head_dim
    products = heads + 2 * ARGS.dim + 2 * ARGS.ffn_dim
    assert ARGS.dim + products < per_token["selective"] < 0.7 * per_token["none"]


class Calls(TorchDispatchMode):
    """Counts the operations that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        attention = "scaled_dot_product" in name and "backward" not in name
        self.count["attention" if attention else name] += 1
        return func(*args, **(kwargs or {}))


def test_what_each_mode_recomputes() -> None:
    products, attentions = {}, {}
    for mode in MODES:
        loss = forward(plain_model(mode), [5, 3])
        with Calls() as calls:
            loss.backward()
        # The backward of products with one input uses addmm_ for all but the first.
        products[mode] = calls.count["aten.mm.default"] + calls.count["aten.addmm_.default"]
        attentions[mode] = calls.count["attention"]
    layers = ARGS.n_layers
    # Two for each of a layer's seven products. The last product of a layer is not recomputed, since
    # the layer's backward does not need it.
    assert products == {"none": 14 * layers, "selective": 14 * layers, "full": 20 * layers}
    assert (attentions["none"], attentions["selective"]) == (0, 0) and attentions["full"] > 0


# ----------------------------------------------------------------------- compiling


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Share one cache of graphs; restore the compiler's settings after this file."""
    import torch._dynamo
    import torch._inductor.config

    shape_config = torch.fx.experimental._config
    with (
        pytest.MonkeyPatch.context() as patch,
        torch._inductor.config.patch(compile_threads=1),
        torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False),
        shape_config.patch(use_duck_shape=shape_config.use_duck_shape),
    ):
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield
    torch._dynamo.reset()


@pytest.fixture
def fresh(compiler: None) -> None:
    """Nothing is compiled yet."""
    torch._dynamo.reset()


@pytest.mark.slow
def test_more_recompilations_than_the_limit_stop_the_run(
    world: World, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transforms, "RECOMPILE_LIMIT", 1)
    # This backend generates no code, which takes long; graphs are counted all the same.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = make(world, compile=True)
    gradients(model, [5, 3])
    with pytest.raises(RuntimeError, match=r'\[compile\] enable: .* compiled 1 times, .*"off"'):
        gradients(model, [1])


@needs_cpp
@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_student_trains_the_same_without_recompiling(
    world: World, fresh: None, mode: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first shape has many tokens."""
    plain, compiled = make(world), make(world, mode, compile=True)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in compiled.named_parameters()]
    before, graphs = transforms.num_compiled_graphs(), []
    for seq_lens in SHAPES:
        assert difference(gradients(plain, seq_lens), gradients(compiled, seq_lens)) < 1e-5
        graphs.append(transforms.num_compiled_graphs() - before)
    # Two halves, for many tokens and for one, for any number of layers.
    assert graphs == [2] + [4] * (len(SHAPES) - 1)
    assert "context_fn" not in capfd.readouterr().err  # torch's warning


@needs_cpp
@pytest.mark.long
def test_compiled_checkpointing_keeps_less(compiler: None) -> None:
    kept = {}
    for mode in MODES:
        torch._dynamo.reset()
        kept[mode] = kept_bytes(plain_model(mode, compile=True), [64, 64])
    assert kept["full"] < 0.4 * kept["selective"] and kept["selective"] < 0.8 * kept["none"]


@needs_cpp
@pytest.mark.long
def test_a_teacher_and_a_generator_are_compiled_once(world: World, fresh: None) -> None:
    """Student, teacher and generator use the same code with three widths."""
    student = make(world, compile=True)
    teachers = [make(world, compile=c, seed=1, **TEACHER) for c in (False, True)]
    generators = [Generator(tiny(vocab_size=VOCAB), EOS) for _ in range(2)]
    transforms.apply_compile(generators[1].model.layers)
    params = SamplingParams(12, temperature=0.9)

    def use(seed: int, lengths: list[tuple[int, int]], some: slice) -> None:
        gradients(student, [sum(pair) - 1 for pair in lengths])
        samples = random_samples(lengths, VOCAB, seed)
        plan = plan_minibatches(samples, 1, 50, world.dp)
        plain, compiled = (score(t, plan, Distribution(0.7), world) for t in teachers)
        for (_, a_R), (_, b_R) in zip(plain, compiled, strict=True):
            torch.testing.assert_close(a_R, b_R, rtol=1e-5, atol=1e-5)
        chosen = prompts()[some]
        wanted = requests(chosen, min(2, len(chosen)))  # alone it is decoded by one row
        plain, compiled = (g.generate(wanted, params) for g in generators)
        assert summary(plain) == summary(compiled)
        for a, b in zip(plain, compiled, strict=True):
            torch.testing.assert_close(a.student_logprobs, b.student_logprobs, rtol=1e-5, atol=1e-5)

    before = transforms.num_compiled_graphs()
    use(0, [(3, 4), (9, 16)], slice(0, 6))
    use(1, [(1, 1)], slice(0, 1))  # one token to train and score on, one prompt of one token
    graphs = transforms.num_compiled_graphs()
    assert graphs - before == len(("student", "teacher", "generator")) * 4
    for seed, size in enumerate((1, 2, 8, 15, 31, 32, 48, 61), start=2):
        use(seed, [(1, size)], slice(size % 5, size % 5 + 1 + size % 7))
        use(seed, [(size, 1), (2, size)], slice(0, 1))
    assert transforms.num_compiled_graphs() == graphs


def compiled_on_two() -> tuple[float, bool, list[int]]:
    """Return the largest difference in training, whether rollouts agree, and numbers of graphs."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1
    world = build_world(CPU, tensor=2)
    plain, compiled = make(world), make(world, "selective", compile=True)
    generators = [Generator(share_of(compiled, world, c), EOS, tp=world.tp) for c in (False, True)]
    worst, same, graphs = 0.0, True, []
    for lens, n in (([5, 3], 5), ([1, 1], 1), ([32], 2), ([64], 7), ([16], 1), ([40, 20], 3)):
        a, b = (gradients(model, lens) for model in (plain, compiled))
        worst = max(worst, difference(a, b))
        wanted = requests(prompts()[:n], 2)
        a, b = (summary(g.generate(wanted, SamplingParams(9))) for g in generators)
        same &= a == b
        graphs.append(transforms.num_compiled_graphs())
    return worst, same, graphs


def share_of(model: Qwen3Model, world: World, compile: bool) -> Qwen3Model:
    share = Qwen3Model(FAMILY.rank_args(model.args, world.tp.size, "")).requires_grad_(False)
    FAMILY.join_ranks(share, world.tp, sequence_parallel=False)
    if compile:
        transforms.apply_compile(share.layers)
    own = {name: p.full_tensor() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in share.named_parameters():
            whole = own[name]
            dim = next((d for d in range(p.dim()) if p.shape[d] != whole.shape[d]), None)
            p.copy_(whole if dim is None else whole.chunk(world.tp.size, dim)[world.tp.rank])
    return share


@needs_cpp
@pytest.mark.long
def test_compiled_blocks_under_tensor_parallelism(compiler: None) -> None:
    """Collectives are compiled too, those of training and the others of rollouts."""
    for worst, same_rollouts, graphs in run_distributed(compiled_on_two, 2):
        assert worst < 1e-5 and same_rollouts
        assert graphs[0] < graphs[1] <= 4 + 5 and graphs[1:] == [graphs[1]] * 5


# --------------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def plain_run(files: Files) -> Path:
    assert train(files.argv("plain")) == 0
    return files.folder / "plain"


def assert_close_run(a: Path, b: Path, first_step: int) -> None:
    """Compare responses from this step on, and numbers and final weights within rounding."""
    close = partial(pytest.approx, rel=1e-4, abs=1e-4)
    rows_a, rows_b = read_rollouts(a), read_rollouts(b)
    for step in range(first_step, 5):
        for row_a, row_b in zip(rows_a[step], rows_b[step], strict=True):
            assert row_a["response"] == row_b["response"]
            for key in ("student_logprobs", "teacher_logprobs"):
                assert row_a[key] == close(row_b[key])
    scalars_a, scalars_b = (read_scalars(out, measured=False) for out in (a, b))
    for name in ("loss/policy", "grad_norm", "kl/student_teacher", "policy/entropy"):
        assert scalars_a[name] == close(scalars_b[name])
    weights_a, weights_b = read_weights(a, 4), read_weights(b, 4)
    for name, weight in weights_a.items():
        torch.testing.assert_close(weights_b[name], weight, rtol=1e-4, atol=1e-4)


@needs_cpp
@pytest.mark.long
def test_a_compiled_run_is_the_plain_one_within_rounding(
    files: Files, plain_run: Path, fresh: None
) -> None:
    assert train(files.argv("compiled", "--compile.enable", "on")) == 0
    assert_close_run(plain_run, files.folder / "compiled", 1)
    # Compiling does not rename: a run that was not compiled goes on compiled.
    shutil.copytree(plain_run, files.folder / "resumed")
    argv = files.argv("resumed", "--compile.enable", "on", "--checkpoint.load_step", 2)
    assert train(argv) == 0
    assert_close_run(plain_run, files.folder / "resumed", 3)


@pytest.mark.long
def test_compiling_without_a_compiler_is_refused(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    run = start(files.argv("refused", "--compile.enable", "on"), stderr=subprocess.PIPE)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 2 and not (files.folder / "refused").exists()
    (line,) = (line for line in err.splitlines() if line.startswith("opd_titan: "))
    assert line.startswith('opd_titan: [compile] enable: "on", but no C++ compiler found')
