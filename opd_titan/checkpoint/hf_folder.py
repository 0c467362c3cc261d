"""Find a Hugging Face model folder, and read its JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from opd_titan.checkpoint.manifest import find_damage
from opd_titan.data.hub import hub_in_reach, looks_like_hub_id
from opd_titan.distributed.heartbeat import beat
from opd_titan.errors import ModelError, first_line, reason

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
CHECKSUMS = "opd_titan_checksums.json"  # written by `export_hf`; other folders have none
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
HUB_FILES = [
    CONFIG,
    GENERATION_CONFIG,
    *TOKENIZER_FILES,
    "*.safetensors",
    "*.safetensors.index.json",
]


def resolve_model_folder(path_or_id: str, key: str, files: Sequence[str] = HUB_FILES) -> Path:
    """Return a model's folder: a local one, or a snapshot from the hub.

    Every rank may call this at once: the hub's cache has its own locks.

    Args:
        path_or_id: a local folder, or a hub id `org/name`.
        key: the config key it came from, for error messages.
        files: patterns of the names of the files to download.

    Raises:
        ModelError: there is no such folder, and the model cannot be downloaded.
    """
    folder = Path(path_or_id).expanduser()
    if path_or_id and folder.is_dir():
        return folder
    if not looks_like_hub_id(path_or_id):
        raise ModelError(
            f"{key} = {path_or_id!r} is neither a local folder nor a hub id such as "
            "'Qwen/Qwen3-0.6B'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import tqdm

    class BeatingBar(tqdm):
        """A progress bar that is a heartbeat too.

        New versions of the library call `update` with bytes; old ones iterate over files.
        """

        def update(self, n: float | None = 1) -> bool | None:
            beat()
            return super().update(n)

        def __iter__(self) -> Iterator[Any]:
            for file in super().__iter__():
                beat()
                yield file

    with hub_in_reach() as trouble:
        try:
            found = snapshot_download(
                path_or_id,
                allow_patterns=[*files],
                ignore_patterns="*/*",
                tqdm_class=BeatingBar,
            )
            return Path(found)
        except RepositoryNotFoundError as error:
            raise ModelError(
                f"{key} = {path_or_id!r} is no local folder and the hub has no such model (or it "
                "is private: log in first)"
            ) from error
        except Exception as error:  # offline, a gated model, a full disk: many classes
            said = f"{type(error).__name__}: {first_line(error)}"
            why = f" and the hub gives no such model here ({said})"
            if trouble:
                why = f", nor downloaded before, and {trouble}"
            raise ModelError(
                f"{key} = {path_or_id!r} is no local folder{why}; download it and give its folder"
            ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raise ModelError, naming the file, if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({reason(error)})") from error
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, too deeply nested
        raise ModelError(f"{path}: is not valid JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: contains a JSON {type(content).__name__}; expected an object")
    return content


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Return the parsed `config.json`. Raise ModelError if there is none."""
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"{path}: is missing; a model folder needs its {CONFIG}")
    return read_json(path)


def check_unchanged(folder: Path) -> None:
    """Check an export of this program against its checksums; ignore other folders. No collective.

    Each rank reads its share of the files, so the caller must raise the error on all ranks.

    Raises:
        ModelError: a file is missing, truncated or altered.
    """
    if not (folder / CHECKSUMS).exists():
        return
    share = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    damage = find_damage(folder / CHECKSUMS, *share)
    if damage is not None:
        raise ModelError(
            f"{damage}; copy the folder again, or delete {CHECKSUMS} in it if the file was changed "
            f"on purpose"
        )


def eos_token_ids(folder: Path, config: dict[str, Any], vocab_size: int) -> set[int]:
    """Return the token ids that end a response, from generation_config.json or else config.json.

    Raises:
        ModelError: neither file has one, or one of them is not a token id of the model.
    """
    path = folder / GENERATION_CONFIG
    value = read_json(path).get("eos_token_id") if path.is_file() else None
    if value is None:
        path, value = folder / CONFIG, config.get("eos_token_id")
    if value is None or value == []:
        raise ModelError(
            f"{folder}: neither {GENERATION_CONFIG} nor {CONFIG} has an eos_token_id; give the id "
            "of the token (or a list of ids) that ends a response"
        )
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise ModelError(
            f"{path}: eos_token_id is {value!r}; expected token ids from 0 to below vocab_size "
            f"{vocab_size}"
        )
    return set(ids)
