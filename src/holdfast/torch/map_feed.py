"""The feed for a DataLoader over a map-style dataset.

The epoch's order is made again from what the random states were when the epoch began, and
consumed batches are skipped as indices, without loading them. In workers, random numbers
are seeded per batch (`holdfast.torch.workers`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from holdfast.errors import LoopError
from holdfast.run.feed import Policy, describe
from holdfast.run.held import DATA_NAMES, Held
from holdfast.run.randomness import libraries
from holdfast.run.search import find_generators
from holdfast.torch.indices import (
    END,
    SIZES,
    EpochIndices,
    Groups,
    ShortBatch,
    draw_base_seed,
    in_private,
    index_sampler,
    is_eager,
    regrouped,
    same_order,
    sample_sampler,
    samplers,
    seeded,
    told,
    twin_of,
)
from holdfast.torch.loaders import LoaderFeed, copy_of, length_of
from holdfast.torch.workers import stop_workers


class MapFeed(LoaderFeed):
    """A dataset with indices: consumed batches are skipped as indices."""

    kind = "map"

    def __init__(self, loader: DataLoader[Any], *, policy: Policy = "refuse") -> None:
        super().__init__(loader, policy=policy)
        self._indices = EpochIndices(loader)
        self._groups = Groups.of(loader)
        self._short = ShortBatch()
        self._copy: DataLoader[Any] | None = None  # holds the workers that persist
        # In workers these are seeded per batch; here they are part of the state.
        found = [] if loader.num_workers else data_generators(loader)
        self._augmenting = Held({str(number): one for number, one in enumerate(found)})
        self.held.append(self._augmenting)
        self._generators = len(found)

    def identity(self) -> dict[str, Any]:
        loader = self.loader
        return {
            "type": self.name,
            "batches": super().length(),
            "samples": length_of(loader.dataset),
            "batch_size": loader.batch_size,
            "drop_last": loader.drop_last,
            "sampler": [type(one).__qualname__ for one in samplers(loader)],
            # How many does not matter. But without any, random numbers come from the
            # global streams.
            "workers": "some" if loader.num_workers else "none",
            "generators in the dataset": self._generators,
        }

    def length(self) -> int | None:
        groups = self._groups
        if groups is None or not groups.goes_on:
            return super().length()
        samples = length_of(sample_sampler(self.loader))
        return None if samples is None else groups.behind_items + groups.left(samples)

    def _find_held(self) -> Held:
        loader = self.loader
        roots = {
            "batch_sampler": loader.batch_sampler,
            "sampler": loader.sampler,
            "generator": loader.generator,
        }
        return Held(
            {name: root for name, root in roots.items() if root is not None},
            lambda value: value is not loader.dataset and _is_iterable_object(value),
            closed=lambda name, value: name in DATA_NAMES or value is loader.dataset,
        )

    def _exact(self) -> bool:
        return super()._exact() or is_eager(self.loader)  # else indices are made ahead

    def _iterate(self, skip: int) -> None:
        # Draws as torch does without workers: the sampler's `iter`, a base seed, the
        # first index. How many workers there are and whether they persist changes nothing.
        loader, groups = self.loader, self._groups
        source = iter(index_sampler(loader))
        twin = twin_of(loader.generator)
        base_seed = draw_base_seed(loader.generator)
        first = 0
        if groups is not None and groups.goes_on:
            # torch's BatchSampler asks for the sampler's `iter` at the first batch.
            samples = source if groups.size is None else iter(sample_sampler(loader))
            indices = regrouped(samples, groups, eager=is_eager(loader))
            first = groups.behind_items
        else:
            indices = source if is_eager(loader) else in_private(source)
        if groups is not None:
            indices = self._short.watch(indices, groups, first)
        for number in range(first, skip):
            if next(indices, END) is END:
                raise LoopError(
                    f"{self.name} has only {number:,} batches now; {skip:,} had been taken "
                    "when the checkpoint was made",
                    hint="Put its data and sampler back as they were.",
                )
        self._indices.source = seeded(indices, base_seed, skip) if loader.num_workers else indices
        if self._copy is None or not loader.persistent_workers:
            which = "sampler" if loader.batch_sampler is None else "batch_sampler"
            self._copy = copy_of(loader, **{which: self._indices}, **self._worker_options())
        # torch draws a base seed where it starts workers: from here, the same one again.
        self._copy.__dict__["generator"] = twin
        self._start_iterator(self._copy)

    def _begin(self) -> None:
        self._augmenting.begin()
        self._groups = Groups.of(self.loader)
        super()._begin()

    def _resume(self, saved: dict[str, Any]) -> None:
        if saved.get("groups") is not None:
            self._groups = Groups.from_tree(saved["groups"])
        super()._resume(saved)
        self._augmenting.restore(saved["augmenting"])

    def _settle(self, saved: dict[str, Any]) -> None:
        super()._settle(saved)
        self._augmenting.settle(saved["augmenting"])

    def _record(self) -> dict[str, Any]:
        groups = self._groups
        counted = (
            {}
            if groups is None
            else {
                "groups": groups.to_tree(),
                "samples_taken": groups.after(self._taken) - self._short.lacking(self._taken),
                "sampler_length": length_of(sample_sampler(self.loader)),
            }
        )
        return {**super()._record(), "augmenting": self._augmenting.state(), **counted}

    # -- going on by sample ------------------------------------------------------

    def _fixed_because(self, saved: dict[str, Any]) -> str:
        if saved.get("kind") != self.kind:
            return "it is another kind of loader now"
        batches = self.loader.batch_sampler
        now, before = Groups.of(self.loader), saved.get("groups")
        if now is None:
            return f"its batches are made by a {describe(batches)}, which alone knows their sizes"
        if before is None:
            return "the checkpoint does not say how many samples its batches had"
        if (now.size is None) != (before["size"] is None):
            return "with batch_size=None, an item of its sampler may be more than one sample"
        return ""

    def _regroup(self, saved: dict[str, Any]) -> str:
        loader = self.loader
        changes = self._held.restore(saved["held"])
        problems = [one for one in changes if one.split()[0] not in SIZES]
        groups = Groups.of(loader)
        assert groups is not None  # else it is fixed
        was, now = saved["identity"], self._identity
        changed = {key for key in now if was.get(key) != now[key]}
        samples = length_of(sample_sampler(loader))
        if samples != saved["sampler_length"]:
            changed.add("sampler length")
        same = not problems and same_order(loader, changed)
        taken = int(saved["samples_taken"])
        first = int(saved["groups"]["first"])
        self._groups = groups = groups.behind(self._taken, taken, first)
        self._epoch = {"rng": saved["rng"], "held": self._held.state()}
        self.random.apply(saved["rng"])
        self._iterate(self._taken)
        if same and was["workers"] == now["workers"] == "none":
            self._held.put(saved["generators"])  # else they may be ahead, by how much depends
        self._augmenting.restore(saved["augmenting"])
        return told(groups, taken, samples, same=same, workers="workers" in changed)

    def _ended(self) -> None:
        super()._ended()
        self._augmenting.end()

    def _share(self, before: MapFeed) -> list[str]:
        own = self._augmenting.inherit(before._augmenting)
        return [*super()._share(before), *(f"a generator in its dataset ({one})" for one in own)]

    def _abandon(self) -> None:
        super()._abandon()
        self._copy = None

    def _drop(self) -> None:
        if self.loader.persistent_workers:
            self._iterator = None  # torch goes on with the same one in the next epoch
        else:
            super()._drop()

    def shutdown(self) -> None:
        self.close()
        if self._copy is not None:
            stop_workers(self._copy._iterator)
            self._copy = None


def _is_iterable_object(value: object) -> bool:
    return (
        hasattr(type(value), "__iter__")
        and hasattr(value, "__dict__")
        and not isinstance(value, Dataset | torch.Tensor | torch.nn.Module | type)
    )


def data_generators(loader: DataLoader[Any]) -> list[Any]:
    """Generator objects in the dataset and collate_fn, each once."""
    known = libraries()
    found = [*find_generators(loader.dataset, known), *find_generators(loader.collate_fn, known)]
    return list({id(generator): generator for _, generator in found}.values())
