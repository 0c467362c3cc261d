"""Model families. A new family is a folder like `qwen3/` and a row in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from opd_titan.errors import ModelError
from opd_titan.models.qwen3.args import Qwen3Args
from opd_titan.models.qwen3.model import Qwen3Model
from opd_titan.models.qwen3.parallelize import join_ranks, parallelize_qwen3, rank_args
from opd_titan.models.qwen3.state_dict import TIED_HF_KEYS, hf_to_native


@dataclass(frozen=True)
class ModelFamily:
    """The interface of a model architecture.

    The program also uses these attributes of the model: `args`, `layers` (blocks with the two
    halves that `transforms` names), `lm_head`, `forward(tokens_T, attend, head)`, `tie_weights` and
    `assert_tied`; and these attributes of `args`: `n_layers`, `n_kv_heads`, `head_dim`,
    `vocab_size`, `tied`, `max_seq_len`, `init_std`, `forward_flops`, `decode_bytes` and
    `activation_bytes`.

    Attributes:
        args_from_hf_config: returns `args` for a parsed config.json and its name in errors.
        build: returns a model of these sizes.
        parallelize: distributes a model over a world, in place.
        rank_args: returns the sizes of one tensor-parallel rank's part; raises if a size cannot be
            split.
        join_ranks: registers the collectives between the parts.
        hf_to_native: returns our parameter names by Hugging Face's names.
        tied_hf_keys: names that a file with tied weights may contain in addition.
    """

    args_from_hf_config: Callable[[dict[str, Any], str], Any]
    build: Callable[[Any], nn.Module]
    parallelize: Callable[..., None]
    rank_args: Callable[[Any, int, str], Any]
    join_ranks: Callable[..., None]
    hf_to_native: Callable[[int, bool], dict[str, str]]
    tied_hf_keys: dict[str, str]


# Keyed by `model_type` of Hugging Face's config.json.
FAMILIES = {
    "qwen3": ModelFamily(
        Qwen3Args.from_hf_config,
        Qwen3Model,
        parallelize_qwen3,
        rank_args,
        join_ranks,
        hf_to_native,
        TIED_HF_KEYS,
    ),
}


def get_family(config: dict[str, Any], where: str) -> ModelFamily:
    """Return the family of a parsed `config.json`.

    Raises:
        ModelError: the model type has no native implementation.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(
            f"{where}: model_type is {model_type!r}, which has no native implementation; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
