"""The endless, shuffled, resumable stream of prompt batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from opd_titan.data.types import Prompt
from opd_titan.errors import CheckpointError, DataError


@dataclass
class EpochBatches:
    """Batches of positions without end, as a stateful batch sampler.

    Epoch e's order depends on (seed, e) and the number of prompts alone, never on the rank, the
    world size or another random generator. Only whole batches: the rest of an epoch's order is
    left out, so that no batch holds a prompt twice and none is seen twice in an epoch.
    """

    num_prompts: int
    batch_size: int
    seed: int
    shuffle: bool
    num_batches: int = 0

    @property
    def batches_per_epoch(self) -> int:
        return self.num_prompts // self.batch_size

    def order(self, epoch: int) -> list[int]:
        """Return all positions in the order of `epoch` (from 0)."""
        if not self.shuffle:
            return list(range(self.num_prompts))
        # SeedSequence mixes the two: (seed 1, epoch 0) and (seed 0, epoch 1) are strangers.
        mixed = np.random.SeedSequence((self.seed % 2**64, epoch)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(mixed))
        return torch.randperm(self.num_prompts, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            epoch, batch = divmod(self.num_batches, self.batches_per_epoch)
            order = self.order(epoch)
            for start in range(batch, self.batches_per_epoch):
                self.num_batches += 1
                yield order[start * self.batch_size : (start + 1) * self.batch_size]

    def state_dict(self) -> dict[str, int]:
        return {"num_batches": self.num_batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_batches = state["num_batches"]


class PromptLoader:
    """Global batches of `prompts_per_step` prompts, the same on every rank; ranks take their slice.

        loader = PromptLoader(prompts, prompts_per_step=8, seed=0)
        batch = next(loader)

    Raises DataError when there are fewer prompts than one batch.
    """

    def __init__(
        self, prompts: list[Prompt], *, prompts_per_step: int, seed: int, shuffle: bool = True
    ) -> None:
        if not 1 <= prompts_per_step <= len(prompts):
            raise DataError(
                f"rollout.prompts_per_step = {prompts_per_step}, but the data set has "
                f"{len(prompts)} prompts after filtering; it must be 1 to {len(prompts)}"
            )
        self._sampler = EpochBatches(len(prompts), prompts_per_step, seed, shuffle)
        with warnings.catch_warnings():
            # torchdata 0.11 calls torch.set_vital, which newer torch warns about.
            warnings.simplefilter("ignore")
            self._loader = StatefulDataLoader(
                prompts,
                batch_sampler=self._sampler,
                collate_fn=list,
                num_workers=0,
                # Its own generator: the default draws from the global one at every start.
                generator=torch.Generator(),
            )
        self._batches = iter(self._loader)

    @property
    def batches_per_epoch(self) -> int:
        """Steps in one pass over the data."""
        return self._sampler.batches_per_epoch

    def __next__(self) -> list[Prompt]:
        return next(self._batches)

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain JSON values, with what it is a position in."""
        return {**self._identity_of_order(), "loader": self._loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises CheckpointError when it belongs to another order."""
        for key, value in self._identity_of_order().items():
            if state.get(key) != value:
                raise CheckpointError(
                    f"{key} is {value} but was {state.get(key)} when the checkpoint was saved; the "
                    f"prompts' order cannot be resumed: set it back, or start in a new folder"
                )
        self._loader.load_state_dict(state["loader"])
        # Build the iterator now: the sampler takes the position over only then.
        self._batches = iter(self._loader)

    def _identity_of_order(self) -> dict[str, Any]:
        sampler = self._sampler
        return {
            "data.num_prompts": sampler.num_prompts,
            "rollout.prompts_per_step": sampler.batch_size,
            "training.seed": sampler.seed,
            "data.shuffle": sampler.shuffle,
        }
