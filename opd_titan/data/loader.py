"""An endless, shuffled, resumable stream of batches of prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from opd_titan.data.types import Prompt
from opd_titan.errors import CheckpointError, DataError


class Epochs:
    """An endless sequence of positions in one set of prompts, in shuffled epochs.

    The order of epoch e depends only on (seed, e, the set's number) and the number of prompts. If
    an epoch has fewer remaining positions than a batch needs, they are dropped. So no batch and no
    epoch has a prompt twice.
    """

    def __init__(self, size: int, seed: int, shuffle: bool, number: int) -> None:
        self.size, self.seed, self.shuffle, self.number = size, seed, shuffle, number
        self.move_to(0, 0)

    def move_to(self, epoch: int, taken: int) -> None:
        """Continue after the first `taken` positions of an epoch, counted from 0."""
        self.epoch, self.taken = epoch, taken
        if self.shuffle:
            # SeedSequence mixes the numbers: (seed 1, epoch 0) and (seed 0, epoch 1) are unrelated.
            entropy = (self.seed % 2**64, epoch, self.number)
            mixed = np.random.SeedSequence(entropy).generate_state(1)[0]
            generator = torch.Generator().manual_seed(int(mixed))
            self._order = torch.randperm(self.size, generator=generator)
        else:
            self._order = torch.arange(self.size)

    def take(self, count: int) -> list[int]:
        """Return the next `count` <= size positions, all of one epoch."""
        if self.taken + count > self.size:
            self.move_to(self.epoch + 1, 0)
        self.taken += count
        return self._order[self.taken - count : self.taken].tolist()


def share_out(
    sizes: Sequence[int], weights: Sequence[float], picked: list[int] | None = None
) -> Iterator[int]:
    """Yield the number of the set that each prompt of a batch is taken from.

    Each prompt is taken from the set that is furthest behind its share (Webster's method of
    apportionment). So every set has its share to within about one prompt at any time, and the sets
    are mixed within a batch. No set gives more prompts than its size.

    Args:
        sizes, weights: by set.
        picked: by set, the number of prompts taken so far; updated in place. None: none yet.
    """
    picked, left = picked if picked is not None else [0] * len(sizes), list(sizes)
    while any(left):
        able = [i for i, count in enumerate(left) if count]
        # If several sets are equally far behind, take the first one.
        chosen = min(able, key=lambda i: (2 * picked[i] + 1) / weights[i])
        picked[chosen] += 1
        left[chosen] -= 1
        yield chosen


class PromptLoader:
    """Global batches of `prompts_per_step` prompts, the same on every rank.

        loader = PromptLoader([prompts], prompts_per_step=8, seed=0)
        batch = next(loader)

    Args:
        sets: sets of prompts.
        weights: by set; its share of the prompts is proportional. None: equal shares.

    Raises:
        DataError: a set has fewer prompts than its share of one batch.
    """

    def __init__(
        self,
        sets: Sequence[Sequence[Prompt]],
        *,
        prompts_per_step: int,
        seed: int,
        shuffle: bool = True,
        weights: Sequence[float] | None = None,
    ) -> None:
        self._sets, self._weights = sets, list(weights or [1.0] * len(sets))
        self._sizes = [len(prompts) for prompts in sets]
        _check_shares(self._sizes, self._weights, prompts_per_step)
        self._batch_size, self._seed, self._shuffle = prompts_per_step, seed, shuffle
        self._epochs = [Epochs(size, seed, shuffle, i) for i, size in enumerate(self._sizes)]
        self._picked = [0] * len(sets)

    @property
    def batches_per_epoch(self) -> int:
        """Steps in one pass over the only set."""
        (size,) = self._sizes
        return size // self._batch_size

    def __next__(self) -> list[Prompt]:
        shares = share_out(self._sizes, self._weights, self._picked)
        sets = list(islice(shares, self._batch_size))
        taken = {i: iter(self._epochs[i].take(count)) for i, count in Counter(sets).items()}
        return [self._sets[i][next(taken[i])] for i in sets]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the options that define the order, as plain JSON values."""
        epochs = [[epochs.epoch, epochs.taken] for epochs in self._epochs]
        return {**self._order(), "picked": list(self._picked), "epochs": epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved position.

        Raises:
            CheckpointError: the position belongs to a different order.
        """
        for key, value in self._order().items():
            if state.get(key) != value:
                raise CheckpointError(
                    f"{key} is {value} but was {state.get(key)} when the checkpoint was saved; the "
                    f"prompts' order cannot be resumed: set it back, or start in a new folder"
                )
        self._picked = list(state["picked"])
        for epochs, (epoch, taken) in zip(self._epochs, state["epochs"], strict=True):
            epochs.move_to(epoch, taken)

    def _order(self) -> dict[str, Any]:
        """Return the values that define the order of the prompts, by their name in messages."""
        return {
            "data.num_prompts": self._sizes,
            "data.weights": self._weights,
            "rollout.prompts_per_step": self._batch_size,
            "training.seed": self._seed,
            "data.shuffle": self._shuffle,
        }


def _check_shares(sizes: Sequence[int], weights: Sequence[float], batch_size: int) -> None:
    if len(sizes) == 1 and not 1 <= batch_size <= sizes[0]:
        raise DataError(
            f"rollout.prompts_per_step = {batch_size}, but the data set has {sizes[0]} prompts "
            f"after filtering; it must be 1 to {sizes[0]}"
        )
    for i, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        share = batch_size * weight / sum(weights)
        if share > size:
            raise DataError(
                f"data.sets[{i}].weight: {weight} of {sum(weights):g} asks for {share:.1f} of the "
                f"{batch_size} prompts of a step, but the set has {size} prompts after "
                f"filtering; lower the weight or rollout.prompts_per_step"
            )
