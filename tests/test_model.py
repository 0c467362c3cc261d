"""The native Qwen3 against transformers' Qwen3ForCausalLM with the same random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from opd_titan.errors import ModelError
from opd_titan.models import FAMILIES, get_family
from opd_titan.models.attention import PackedAttention
from opd_titan.models.qwen3.args import Qwen3Args
from opd_titan.models.qwen3.model import Qwen3Model

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

FAMILY = FAMILIES["qwen3"]
BASE = dict(
    model_type="qwen3",
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    max_position_embeddings=512,
    rope_theta=1e6,
    # Larger than the usual 0.02, so that attention and the MLP move the residual stream.
    initializer_range=0.2,
)
CONFIGS: dict[str, dict[str, Any]] = {
    "gqa1": dict(num_key_value_heads=8),
    "gqa2_tied": dict(tie_word_embeddings=True),
    "gqa4_theta1e4": dict(num_key_value_heads=2, rope_theta=1e4),
    "gqa8_theta5e6": dict(num_key_value_heads=1, rope_theta=5e6, tie_word_embeddings=True),
    "wide_heads_1_layer": dict(head_dim=32, num_hidden_layers=1, num_attention_heads=4),
    "narrow_heads": dict(head_dim=6, num_attention_heads=6, num_key_value_heads=3),
    "12_layers": dict(num_hidden_layers=12, num_key_value_heads=2, initializer_range=0.08),
    "rope_parameters": dict(
        rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    ),
    "odd_sizes_eps": dict(hidden_size=60, vocab_size=101, rms_norm_eps=1e-3),
}
LENGTHS = [7, 1, 33, 12, 2, 64, 5]


def make_pair(overrides: dict[str, Any]) -> tuple[Qwen3Model, Qwen3ForCausalLM]:
    """The same random weights in both models, norm weights included."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    raw = {k: v for k, v in {**BASE, **overrides}.items() if v is not None}
    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(Qwen3Config(**raw)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5)
    args = FAMILY.args_from_hf_config(raw, "config.json")
    ours = FAMILY.build(args)
    with torch.no_grad():
        for hf, native in FAMILY.hf_to_native(args.n_layers, args.tied).items():
            ours.get_parameter(native).copy_(theirs.get_parameter(hf))
    return ours, theirs


def random_sequences(vocab_size: int, lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (n,), generator=generator) for n in lengths]


def packed_logits(model: Qwen3Model, sequences: list[Tensor]) -> Tensor:
    attend = PackedAttention([len(s) for s in sequences], torch.device("cpu"))
    return model(torch.cat(sequences), attend, lambda h, w: h @ w.t())


def one_by_one(model: Qwen3ForCausalLM, sequences: list[Tensor]) -> Tensor:
    return torch.cat([model(s[None]).logits[0] for s in sequences])


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_packed_logits_equal_transformers(name: str) -> None:
    ours, theirs = make_pair(CONFIGS[name])
    sequences = random_sequences(ours.args.vocab_size, LENGTHS)
    truth = one_by_one(theirs, sequences)
    assert relative_error(packed_logits(ours, sequences), truth) <= 1e-5
    # The weights matter: a model that ignored its layers would not come out so.
    assert relative_error(packed_logits(ours, [s.flip(0) for s in sequences]), truth) > 0.1


@torch.no_grad()
def test_both_config_styles_of_transformers_give_the_same_model() -> None:
    from transformers import Qwen3Config

    old = Qwen3Args.from_hf_config({**BASE, "rope_theta": 5e5}, "")
    new = {k: v for k, v in BASE.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert Qwen3Args.from_hf_config(new, "") == old
    written = Qwen3Config(**{**BASE, "rope_theta": 5e5}).to_dict()
    assert Qwen3Args.from_hf_config(written, "") == old


@torch.no_grad()
def test_packing_equals_one_by_one() -> None:
    ours, _ = make_pair({})
    sequences = random_sequences(ours.args.vocab_size, LENGTHS)
    alone = torch.cat([packed_logits(ours, [s]) for s in sequences])
    assert relative_error(packed_logits(ours, sequences), alone) <= 1e-6


@torch.no_grad()
def test_a_sequence_does_not_see_its_neighbours() -> None:
    ours, _ = make_pair({})
    a, b, c = random_sequences(ours.args.vocab_size, [9, 14, 11])
    before = packed_logits(ours, [a, b, c])[9:23]
    after = packed_logits(ours, [a.flip(0), b, (c + 1) % ours.args.vocab_size])[9:23]
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["gqa4_theta1e4", "gqa8_theta5e6"])
def test_gradients_equal_transformers(name: str) -> None:
    """Also of the tied embedding, which collects the head's gradient."""
    ours, theirs = make_pair(CONFIGS[name])
    sequences = random_sequences(ours.args.vocab_size, LENGTHS)
    targets = torch.cat(sequences).roll(-1)
    for logits in (packed_logits(ours, sequences), one_by_one(theirs, sequences)):
        torch.nn.functional.cross_entropy(logits, targets).backward()
    for hf, native in FAMILY.hf_to_native(ours.args.n_layers, ours.args.tied).items():
        mine, other = ours.get_parameter(native).grad, theirs.get_parameter(hf).grad
        assert relative_error(mine, other) <= 2e-5, native


@pytest.mark.parametrize("name", ["gqa2_tied", "12_layers"])
@torch.no_grad()
def test_bf16_is_within_its_rounding(name: str) -> None:
    """As near to fp32 (of the same rounded weights) as transformers' own bf16 is."""
    ours, theirs = make_pair(CONFIGS[name])
    sequences = random_sequences(ours.args.vocab_size, LENGTHS)
    ours, theirs = ours.bfloat16(), theirs.bfloat16()
    mine, other = packed_logits(ours, sequences), one_by_one(theirs, sequences)
    truth = packed_logits(ours.float(), sequences)
    assert mine.dtype == torch.bfloat16
    error = relative_error(mine, truth)
    assert error <= 1.5 * relative_error(other, truth)
    assert error <= 0.05


def test_tied_head_is_one_parameter() -> None:
    model = FAMILY.build(FAMILY.args_from_hf_config({**BASE, "tie_word_embeddings": True}, ""))
    assert model.lm_head.weight is model.tok_embeddings.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(use_sliding_window=True, sliding_window=128), "use_sliding_window"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_scaling"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}), "rope_parameters"),
        (dict(rope_parameters={"rope_theta": 1e6, "partial_rotary_factor": 0.5}), "partial_rotary"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (
            dict(rope_parameters={"rope_type": "yarn"}, rope_scaling={"rope_type": "default"}),
            "rope_parameters",
        ),
        (dict(rope_parameters={"rope_theta": 5e6}), "rope_theta"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(attention_dropout=0.1), "attention_dropout"),
        (dict(model_type="llama"), "model_type"),
        (dict(model_type="qwen3_moe"), "model_type"),
        (dict(model_type=None), "model_type"),
        (dict(model_type=[]), "model_type"),
        (dict(quantization_config={"quant_method": "fp8"}), "quantization_config"),
        (dict(hidden_act="gelu"), "hidden_act"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    config = {**BASE, **change}
    with pytest.raises(ModelError) as caught:
        get_family(config, "folder/config.json").args_from_hf_config(config, "folder/config.json")
    message = str(caught.value)
    assert named in message and "folder/config.json" in message and "\n" not in message
    shown = next(v for v in change.values())
    if not isinstance(shown, dict):
        assert repr(shown) in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", None),
        ("hidden_size", None),
        ("num_hidden_layers", 0),
        ("num_attention_heads", "8"),
        ("num_key_value_heads", 3),
        ("intermediate_size", 96.5),
        ("head_dim", 15),
        ("head_dim", True),
        ("rms_norm_eps", -1e-6),
        ("rope_theta", None),
        ("rope_theta", "1e6"),
        ("rope_theta", True),
        ("rope_theta", float("nan")),
        ("tie_word_embeddings", 1),
        ("rope_parameters", "default"),
        ("rope_scaling", ["yarn"]),
        ("layer_types", 3),
        ("head_dim", None),
    ],
    ids=str,
)
def test_missing_or_impossible_sizes_are_named(key: str, value: Any) -> None:
    config = {k: v for k, v in {**BASE, key: value}.items() if v is not None}
    if (key, value) == ("head_dim", None):  # Qwen3Config's default; published files leave it out
        from transformers import Qwen3Config

        assert Qwen3Args.from_hf_config(config, "").head_dim == Qwen3Config().head_dim == 128
        return
    with pytest.raises(ModelError, match=key) as caught:
        Qwen3Args.from_hf_config(config, "config.json")
    assert "\n" not in str(caught.value)
