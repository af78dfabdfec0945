"""The feed for a DataLoader over a map-style dataset.

The epoch's order is made again from what the random states were when the epoch began, and
consumed batches are skipped as indices, without loading them. In workers, random numbers
are seeded per batch (`holdfast.torch.workers`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from holdfast.errors import LoopError
from holdfast.run.console import plural
from holdfast.run.dealing import Deal, ranks_in
from holdfast.run.feed import Policy, describe
from holdfast.run.held import DATA_NAMES, Held
from holdfast.run.randomness import libraries
from holdfast.run.search import find_generators
from holdfast.torch.dealt import Dealer, dealer_of
from holdfast.torch.indices import (
    END,
    SIZES,
    EpochIndices,
    Groups,
    ShortBatch,
    batches_of,
    cautions,
    draw_base_seed,
    in_private,
    index_sampler,
    is_eager,
    is_shard,
    length_of,
    regrouped,
    same_order,
    sample_sampler,
    samplers,
    seeded,
    told,
    twin_of,
)
from holdfast.torch.loaders import LoaderFeed, copy_of
from holdfast.torch.workers import stop_workers


class MapFeed(LoaderFeed):
    """A dataset with indices: consumed batches are skipped as indices."""

    kind = "map"

    def __init__(self, loader: DataLoader[Any], *, policy: Policy = "refuse") -> None:
        super().__init__(loader, policy=policy)
        self._indices = EpochIndices(loader)
        self._groups = Groups.of(loader)
        self._deal = Deal(1)
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
        groups, deal, dealer = self._groups, self._deal, self._dealer()
        if deal.goes_on and dealer is not None:
            left = dealer.left(deal, groups)
            before = deal.items if groups is None else groups.behind_items
            return None if left is None else before + left
        if groups is None or not groups.goes_on:
            return super().length()
        samples = length_of(sample_sampler(self.loader))
        return None if samples is None else groups.behind_items + groups.left(samples)

    def left(self, saved: dict[str, Any]) -> int | None:
        self._whose = self.whose()
        if saved.get("kind") != self.kind or saved["at"] != "inside" or self._undealt(saved):
            return None
        self._place(saved)
        length = self.length()
        return None if length is None else max(0, length - int(saved["taken"]))

    def _find_held(self) -> Held:
        loader = self.loader
        roots = {
            "batch_sampler": batches_of(loader),
            "sampler": loader.sampler,
            "generator": loader.generator,
        }
        return Held(
            {name: root for name, root in roots.items() if not (root is None or is_shard(root))},
            lambda value: value is not loader.dataset and _is_iterable_object(value),
            closed=lambda name, value: name in DATA_NAMES or value is loader.dataset,
        )

    def _exact(self) -> bool:
        return super()._exact() or is_eager(self.loader)  # else indices are made ahead

    def _iterate(self, skip: int) -> None:
        # Draws as torch does without workers: the sampler's `iter`, a base seed, the
        # first index. How many workers there are and whether they persist changes nothing.
        loader, groups, deal = self.loader, self._groups, self._deal
        source = iter(index_sampler(loader))
        twin = twin_of(loader.generator)
        base_seed = draw_base_seed(loader.generator)
        first, dealer = 0, self._dealer()
        if deal.goes_on and dealer is not None:
            indices = dealer.rest(deal, groups)
            first = deal.items if groups is None else groups.behind_items
        elif groups is not None and groups.goes_on:
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
        self._groups, self._deal = Groups.of(self.loader), Deal(self._whose.size)
        super()._begin()

    def _prepare(self, saved: dict[str, Any]) -> list[str]:
        dealer = self._dealer()
        with self._keeping_own(saved, self._held):
            changes = super()._prepare(saved)
        if dealer is not None:
            changes = self._unexplained(saved, changes, dealer)
        if self._is_free(saved):
            self._epoch["rng"] = self._own_rng(saved)
        # The sampler's attributes, generators of its own: those of this rank from now on.
        if not changes and (self._is_free(saved) or self._other_ranks(saved)):
            self._epoch["held"] = self._held.state()
        self._place(saved)
        return changes

    def _resume(self, saved: dict[str, Any]) -> None:
        with self._keeping_own(saved, self._augmenting):
            self._augmenting.restore(saved["augmenting"])
        super()._resume(saved)

    def _settle(self, saved: dict[str, Any]) -> None:
        with self._keeping_own(saved, *self.held):
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
        if (dealer := self._dealer()) is not None:
            lacking = self._short.lacking(self._taken)
            counted["deal"] = self._deal.to_tree()
            counted["order_length"] = dealer.total()
            counted["taken_by_all"] = dealer.taken(self._deal, groups, self._taken, lacking)
        return {**super()._record(), "augmenting": self._augmenting.state(), **counted}

    # -- the number of ranks has changed -----------------------------------------

    def _dealer(self) -> Dealer | None:
        return dealer_of(self.loader, self.whose())

    def _undealt(self, saved: dict[str, Any]) -> str:
        if self._dealer() is not None and "taken_by_all" in saved:
            return ""
        batches = batches_of(self.loader)
        known = batches is None or type(batches) is BatchSampler
        if known or ranks_in(*samplers(self.loader)) is None:
            return super()._undealt(saved)
        return f"only its {describe(batches)} knows which samples the other ranks had"

    def _unexplained(self, saved: dict[str, Any], changes: list[str], dealer: Dealer) -> list[str]:
        """Changes of the sampler that do not come from this being another rank, or one of
        another number of them."""
        if not self._other_ranks(saved) and not self._of_another(saved):
            return changes
        left = [change for change in changes if not dealer.explains(change)]
        was, now = saved.get("order_length"), dealer.total()
        return left if was == now else [*left, f"samples in its order was {was}, is {now}"]

    def _place(self, saved: dict[str, Any]) -> None:
        """Say where in its order the epoch goes on: what is dealt to whom, in which groups."""
        if saved.get("groups") is not None:
            self._groups = Groups.from_tree(saved["groups"])
        self._deal = self._saved_deal(saved)
        dealer = self._dealer()
        if self._other_ranks(saved) and dealer is not None:
            deal = Deal(self._whose.size, int(saved["taken_by_all"]), int(saved["taken"]))
            self._deal, self._groups = dealer.moved(deal, Groups.of(self.loader))

    def _saved_deal(self, saved: dict[str, Any]) -> Deal:
        # Old checkpoints do not have it: nothing was dealt anew then.
        return Deal.from_tree(saved["deal"]) if "deal" in saved else Deal(self._whose.size)

    def _dealt(self) -> str:
        if self._taken == 0:
            return ""  # the epoch has not begun on any rank
        behind, items = self._deal.behind, self.length()
        if self._groups is not None and not self._deal.goes_on:
            behind = self._groups.behind_samples
        text = f"It goes on behind the {plural(behind, 'sample')} that all ranks have had"
        if items is not None:
            text += f"; left: {plural(max(0, items - self._taken), 'item')} on each"
        return text

    def _is_free(self, saved: dict[str, Any]) -> bool:
        dealer = self._dealer()
        return dealer is not None and dealer.free and self._of_another(saved)

    @contextmanager
    def _keeping_own(self, saved: dict[str, Any], *helds: Held) -> Iterator[None]:
        """Where this rank may draw what it likes: leave its generators as it has made them,
        so that it does not draw what the other one draws."""
        own = [(held, held.generators()) for held in helds] if self._is_free(saved) else []
        yield
        for held, generators in own:
            held.put(generators)

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
        with self._keeping_own(saved, self._held):
            changes = self._held.restore(saved["held"])
        problems = [one for one in changes if one.split()[0] not in SIZES]
        if (dealer := self._dealer()) is not None:
            problems = self._unexplained(saved, problems, dealer)
        groups = Groups.of(loader)
        assert groups is not None  # else it is fixed
        was, now = saved["identity"], self._identity
        changed = {key for key in now if was.get(key) != now[key]}
        samples = length_of(sample_sampler(loader))
        if samples != saved["sampler_length"] and not self._other_ranks(saved):
            changed.add("sampler length")
        same = not problems and same_order(loader, changed)
        taken = int(saved["samples_taken"])
        if other := bool(self._other_ranks(saved)):
            self._place(saved)
        else:
            self._deal = self._saved_deal(saved)
            groups = groups.behind(self._taken, taken, int(saved["groups"]["first"]))
            self._groups = groups
        rng = self._own_rng(saved) if self._is_free(saved) else saved["rng"]
        self._epoch = {"rng": rng, "held": self._held.state()}
        self.random.apply(rng)
        self._iterate(self._taken)
        if same and was["workers"] == now["workers"] == "none" and not self._is_free(saved):
            self._held.put(saved["generators"])  # else they may be ahead, by how much depends
        with self._keeping_own(saved, self._augmenting):
            self._augmenting.restore(saved["augmenting"])
        if other or self._deal.goes_on:
            words = self._dealt()
        else:
            words = told(groups, taken, samples)
        return words + cautions(same=same, workers="workers" in changed)

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
