"""The endless, shuffled, resumable stream of prompt batches."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, islice
from typing import Any

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from opd_titan.data.types import Prompt
from opd_titan.errors import CheckpointError, DataError


@dataclass
class Epochs:
    """The positions of one set of prompts without end, a part of a batch at a time.

    Epoch e's order depends on (seed, e, the set's number) and the number of prompts alone, never on
    the rank, the world size or another random generator. What is left of an epoch's order when a
    batch needs more is left out, so that no batch holds a prompt twice and none is seen twice in an
    epoch.
    """

    num_prompts: int
    seed: int
    shuffle: bool
    number: int = 0
    epoch: int = 0
    taken: int = 0
    _order: list[int] = field(default_factory=list, init=False)

    def order(self) -> list[int]:
        """Return all positions in the order of the present epoch (from 0)."""
        if not self.shuffle:
            return list(range(self.num_prompts))
        # SeedSequence mixes them: (seed 1, epoch 0) and (seed 0, epoch 1) are strangers.
        entropy = (self.seed % 2**64, self.epoch, self.number)
        mixed = np.random.SeedSequence(entropy).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(mixed))
        return torch.randperm(self.num_prompts, generator=generator).tolist()

    def take(self, count: int) -> list[int]:
        """The next `count` <= num_prompts positions, of one epoch."""
        if self.taken + count > self.num_prompts:
            self.epoch, self.taken, self._order = self.epoch + 1, 0, []
        self._order = self._order or self.order()
        self.taken += count
        return self._order[self.taken - count : self.taken]


def share_out(
    sizes: Sequence[int], weights: Sequence[float], picked: list[int] | None = None
) -> Iterator[int]:
    """Whose each place of a batch is, of sets of these sizes; none gives more than it has.

    Each goes to the set that is furthest behind its share (Webster's method of apportionment), so
    that after any number of places every set has had its share to within about one, and the sets
    are mixed within a batch, too.

    Args:
        picked: by set, the places that it has had so far; kept up to date.
    """
    picked, left = picked if picked is not None else [0] * len(sizes), list(sizes)
    while any(left):
        able = [i for i, count in enumerate(left) if count]
        # The first of those that are as far behind.
        chosen = min(able, key=lambda i: (2 * picked[i] + 1) / weights[i])
        picked[chosen] += 1
        left[chosen] -= 1
        yield chosen


class MixedBatches:
    """Batches of positions in the sets laid end to end, without end, as a stateful batch sampler.

    Args:
        sizes, weights: by set.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.sizes, self.weights, self.batch_size = sizes, weights, batch_size
        self.epochs = [Epochs(size, seed, shuffle, i) for i, size in enumerate(sizes)]
        self.picked = [0] * len(sizes)
        self._first = [0, *accumulate(sizes)]

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            sets = list(islice(share_out(self.sizes, self.weights, self.picked), self.batch_size))
            counts = Counter(sets)
            taken = {i: iter(self.epochs[i].take(count)) for i, count in counts.items()}
            yield [self._first[i] + next(taken[i]) for i in sets]

    def state_dict(self) -> dict[str, Any]:
        return {
            "picked": list(self.picked),
            "epochs": [{"epoch": e.epoch, "taken": e.taken} for e in self.epochs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.picked = list(state["picked"])
        self.epochs = [
            replace(e, **place) for e, place in zip(self.epochs, state["epochs"], strict=True)
        ]


class PromptLoader:
    """Global batches of `prompts_per_step` prompts, the same on every rank; ranks take their slice.

        loader = PromptLoader([prompts], prompts_per_step=8, seed=0)
        batch = next(loader)

    Args:
        sets: of prompts.
        weights: of the sets, whose shares of the prompts are proportional to them; None: equal.

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
        sizes, weights = [len(prompts) for prompts in sets], list(weights or [1.0] * len(sets))
        _check_shares(sizes, weights, prompts_per_step)
        self._sampler = MixedBatches(sizes, weights, prompts_per_step, seed, shuffle)
        with warnings.catch_warnings():
            # torchdata 0.11 calls torch.set_vital, which newer torch warns about.
            warnings.simplefilter("ignore")
            self._loader = StatefulDataLoader(
                list(chain(*sets)),
                batch_sampler=self._sampler,
                collate_fn=list,
                num_workers=0,
                # Its own generator: the default draws from the global one at every start.
                generator=torch.Generator(),
            )
        self._batches = iter(self._loader)

    @property
    def batches_per_epoch(self) -> int:
        """Steps in one pass over the data, which several sets have none of."""
        (size,) = self._sampler.sizes
        return size // self._sampler.batch_size

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
            "data.num_prompts": list(sampler.sizes),
            "data.weights": list(sampler.weights),
            "rollout.prompts_per_step": sampler.batch_size,
            "training.seed": sampler.epochs[0].seed,
            "data.shuffle": sampler.epochs[0].shuffle,
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
                f"data.sets[{i}].weight: {weight} of {sum(weights):g} is {share:.1f} of "
                f"[rollout] prompts_per_step = {batch_size}, but the set has {size} prompts after "
                f"filtering; lower one of the two"
            )
