"""What a GPU would be asked to do, without one: the program on tensors of a GPU without data.

Needs a CUDA build of PyTorch, which imports without a GPU; CONTRIBUTING.md has the command.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tiny_rollout import ARGS, EOS, prompts, requests
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opd_titan.data.types import Sample
from opd_titan.distill.head import FrozenHeads, LossHead, LossRule
from opd_titan.distill.objectives import OBJECTIVES, ObjectiveSettings
from opd_titan.distill.update import pack_scored
from opd_titan.distill.vocabulary import TokenScores
from opd_titan.distributed.world import ALONE, World
from opd_titan.models.attention import PackedAttention
from opd_titan.models.kernels.paged import choose_paged_attention
from opd_titan.models.layers import join
from opd_titan.models.logits import Distribution, VocabHead
from opd_titan.models.qwen3.model import Qwen3Model
from opd_titan.rollout.generator import Generator
from opd_titan.rollout.runner import Runner
from opd_titan.rollout.sampler import SamplingParams
from opd_titan.rollout.scheduler import Chunk, Scheduler, Work

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="needs a CUDA build of PyTorch (no GPU)"
)
CUDA = torch.device("cuda", 0)
PROMPTS = prompts([9, 4])
SIZES = replace(ARGS, head_dim=64, dim=256, ffn_dim=512, vocab_size=2048)
# Operators that launch nothing, and those that launch more than one kernel.
FREE = {
    *("view", "_unsafe_view", "slice", "select", "split", "split_with_sizes", "unsqueeze"),
    *("squeeze", "expand", "t", "transpose", "permute", "unbind", "alias", "detach", "device"),
    *("empty", "empty_like", "new_empty", "empty_strided", "as_strided"),
}
SEVERAL = {"paged_decode": 2}


class Launches(TorchDispatchMode):
    """Counts the kernels that are launched on the device.

    Attributes:
        names: of operators, with the number of their launches.
        waits: operators that copy between host and device, or make the host wait.
        copies: between them, for which nobody waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.waits: list[str] = []
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors if x.dim() or x.device.type == "cuda"}
        if len(devices) > 1 and (kwargs or {}).get("non_blocking"):
            self.copies += 1
        elif len(devices) > 1 or name in ("_local_scalar_dense", "nonzero"):
            self.waits.append(name)
        if "cuda" in devices and name not in FREE:
            self.names[name] += SEVERAL.get(name, 1)
        return out


@pytest.fixture
def gpu() -> Iterator[None]:
    """A Hopper without data."""
    with (
        patch("torch.cuda.get_device_capability", lambda device=None: (9, 0)),
        patch.object(Tensor, "pin_memory", lambda tensor: tensor),  # tensors without data have none
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
    ):
        yield


def runner_of(params: SamplingParams, joined: bool = True, **sizes: Any) -> Runner:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(CUDA):
            model = Qwen3Model(replace(SIZES, **sizes)).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    if joined:
        for layers in model.layers_with_one_input():
            join(layers)
    generator = Generator(model, EOS)
    assert generator.path.name == "triton" and not generator.path.why
    generator.free_bytes = lambda: 1 << 34
    with patch.object(Runner, "_weight_addresses", lambda self: []):
        return generator.make_runner(8, 4, params)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.7}, {"top_k": 9}])
def test_a_decoding_step_never_waits_for_the_host(gpu, options: dict[str, Any]) -> None:
    runner = runner_of(SamplingParams(8, **options))
    with Launches() as launches:
        runner._step(8)
    assert launches.waits == [] and launches.copies == 0


@pytest.mark.parametrize("joined, most", [(True, 10), (False, 13)])
def test_launches_of_a_layer(gpu, joined: bool, most: int) -> None:
    counts = []
    for layers in (2, 3):
        runner = runner_of(SamplingParams(8), joined, n_layers=layers)
        with Launches() as launches:
            runner._step(8)
        counts.append(launches.names)
    layer = counts[1] - counts[0]
    assert sum(layer.values()) <= most, layer


def test_launches_of_a_step_beside_its_layers(gpu) -> None:
    runner = runner_of(SamplingParams(8), n_layers=1)
    with Launches() as launches:
        runner._step(8)
    beside = sum(launches.names.values()) - 10
    assert beside <= 45, launches.names


def test_what_happens_between_steps_stays_on_its_device(gpu) -> None:
    """No operator of prefill, starts, new pages and moves mixes devices by mistake."""
    runner = runner_of(SamplingParams(8))
    runner.prefill([Chunk([1] * 70, 0, [0, 1]), Chunk([2] * 5, 0, [2])])
    runner.prefill([Chunk([1] * 20, 70, [0, 1]), Chunk([2] * 5, 0, [2])])
    work = Scheduler([requests(PROMPTS[:1], 3)], 8, 100, 64, 8, 100).schedule()
    nothing = Work([], [], [], [], [], [], work.running)
    # The changes before a step reach the device in one copy.
    changes = {
        "starts": replace(nothing, started=work.started),
        "a page": replace(nothing, new_pages=[(0, 1, 7)]),
        "a move and a start": replace(nothing, moves=[(2, 0)], started=work.started[2:]),
    }
    runner._step, runner.captures = lambda n: None, False
    runner.eos = runner.eos[:0]  # stop flags would need an event of CUDA
    for name, change in changes.items():
        with Launches() as launches:
            runner.run(change)
        assert (len(launches.waits), launches.copies) == (0, 1), name
    runner.cache.copy_pages(work.copies)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_head_stays_on_its_device(gpu, name: str) -> None:
    """Forward, which holds the gradients too. Nothing but the choice of probes is sent."""
    R, D, V = 40, 64, 2048
    hidden_TD, other_RD, weight_VD, other_VD = (
        torch.empty(n, D, dtype=torch.bfloat16, device=CUDA) for n in (R + 3, R, V, V)
    )
    weight_VD.requires_grad_()
    targets_R = torch.empty(R, dtype=torch.int64, device=CUDA)
    settings = ObjectiveSettings()
    objective = OBJECTIVES[name]
    rule = LossRule(objective, settings, Distribution())
    scores = TokenScores(teacher=torch.empty(R, device=CUDA))
    frozen = FrozenHeads()
    if objective.needs_vocabulary(settings):
        scores, frozen = TokenScores(teacher_hidden=other_RD), FrozenHeads(VocabHead(other_VD))
    # Autograd's engine wants a device: this is the gradient of a loss by the sampled log-probs.
    engine = patch("torch.autograd.grad", lambda loss, logprob_C: (torch.empty_like(logprob_C),))
    with engine, torch.enable_grad(), Launches() as launches:
        head = LossHead(rule, targets_R, targets_R, scores, scale=1.0, frozen=frozen)
        loss, stats = head(hidden_TD, weight_VD)
    assert loss.device == stats.loss_R.device == stats.entropy_R.device == CUDA
    assert len(launches.waits) <= 1, launches.waits
    if name in ("policy_gradient", "sft"):
        assert {"logit_stats", "softmax_grad"} <= launches.names.keys()
    if name == "reverse_kl":
        assert {"kl_stats", "kl_grad"} <= launches.names.keys()


def test_training_attends_with_grouped_heads_as_they_are(gpu) -> None:
    attend = PackedAttention([3, 5], CUDA)
    q, k = (torch.empty(8, n, 64, dtype=torch.bfloat16, device=CUDA) for n in (4, 2))
    attend(q, k, k, 0)
    with Launches() as launches:
        assert attend(q, k, k, 0).shape == q.shape
    assert launches.names == {"_varlen_attn": 1}


@pytest.mark.parametrize("group", [1, 3], ids=["alone", "shared prompts"])
def test_a_micro_batch_is_sent_in_copies_that_nobody_waits_for(gpu, group: int) -> None:
    """All indices in one, those of the packed kernel in a second, each model's scores in one."""
    samples = [Sample(p, n, [1, 2, 3], "length") for p in PROMPTS for n in range(group)]
    for s in samples:
        s.student_logprobs, s.teacher_logprobs = torch.empty(2, 3)
    world = World(CUDA, None, ALONE, ALONE)
    with Launches() as launches:
        (batch, scores), _ = (pack_scored(some, world, FrozenHeads()) for some in (samples, ()))
        layers = [torch.empty(len(batch.tokens_T), n, 64, device=CUDA).half() for n in (4, 2, 2)]
        for layer in range(2):
            batch.attend(*layers, layer)
    assert {t.device for t in (batch.tokens_T, batch.predict_R, scores.teacher)} == {CUDA}
    assert launches.waits == []
    assert launches.copies == 2 + 2 + 1  # the last is the empty micro-batch's


@pytest.mark.parametrize("head_dim, dtype", [(96, torch.bfloat16), (64, torch.float32)])
def test_a_slower_path_says_why(gpu, head_dim: int, dtype: torch.dtype) -> None:
    path = choose_paged_attention(head_dim, dtype, CUDA)
    assert path.name != "triton"
    assert f"(slow: {path.why})" in str(path) and re.search(r"head sizes .*96|float32", path.why)
