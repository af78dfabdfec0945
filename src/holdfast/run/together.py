"""The other ranks of a run, as its session sees them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from holdfast.core import frameworks
from holdfast.core.group import ALONE, Group, Ranks
from holdfast.errors import CorruptionError, GroupError, UsageError
from holdfast.manager.ranks import told
from holdfast.run.agreement import Agreement
from holdfast.run.console import Console, apart_line, node_disks_line, order_line, plural
from holdfast.run.decisions import Decisions
from holdfast.run.saves import Saves


class TogetherWith:
    """Those that this process trains with; nobody, before `meet` and where there are none."""

    def __init__(
        self,
        wish: Group | bool | None,
        manager: Any,
        decisions: Decisions,
        saves: Saves,
        console: Console,
        holds: bool,
    ) -> None:
        """`wish` as `Run` takes it; `holds`: its `hold=` was given."""
        self._wish = wish
        self._manager = manager
        self._decisions = decisions
        self._saves = saves
        self._console = console
        self._holds = holds
        self._group: Group | None = None
        self._met = False

    def meet(self) -> Ranks:
        """Before anything is read: find out who there is, once. All ranks come here. Raises
        GroupError if they do not have the same run, UsageError for what only one process can
        do."""
        if not self._met:
            self._meet()
            self._met = True
        return self.ranks

    def _meet(self) -> None:
        wish, manager = self._wish, self._manager
        group = frameworks.process_group() if wish is None or wish is True else wish or None
        if group is None:
            if wish is True:
                raise UsageError(
                    f"{manager.address}: group=True, and no framework has connected this process "
                    "with others",
                    hint="Call torch.distributed.init_process_group() before the loop starts.",
                )
            return
        addresses = group.gather(manager.address)
        if len(set(addresses)) == len(addresses) > 1:
            if group.ranks.rank == 0:
                self._console.loud(apart_line(len(addresses)))
            return
        if len(set(addresses)) > 1:
            raise GroupError(
                f"some ranks share a run and some do not: {', '.join(sorted(set(addresses)))}",
                hint="Give all of them one address, or each its own.",
            )
        rules = group.gather(self._decisions.rules)
        if len(set(rules)) > 1:
            raise GroupError(
                f"{manager.address}: the ranks save by different rules: "
                f"{', '.join(map(repr, sorted(set(rules))))}",
                hint="Give all of them the same every=.",
            )
        if self._holds:
            raise UsageError(
                f"{manager.address}: hold= is for one process: of several, one alone cannot tell "
                "what the others hold",
                hint="Leave it out; a stop that is asked for is agreed on and saved in time.",
            )
        self._group = group
        manager.save_with(group)
        self._decisions.agree(Agreement(group), first=group.ranks.rank == 0)
        self._console.rank = group.ranks.rank
        self._saves.first = self.is_first
        if manager.on_node_disks:
            self._console.say(node_disks_line(manager.address, manager.mirror))

    @property
    def group(self) -> Group | None:
        """What connects them; after `meet`. None: this process is alone."""
        return self._group

    @property
    def ranks(self) -> Ranks:
        """This process, and how many there are; after `meet`."""
        return ALONE if self._group is None else self._group.ranks

    @property
    def is_first(self) -> bool:
        """Whether what this rank has logged is what the checkpoints have."""
        return self._group is None or self._group.ranks.rank == 0

    def all_agree(self, here: bool) -> bool:
        """Whether it is so on all ranks. All of them ask."""
        return here if self._group is None else all(self._group.gather(here))

    def finished(self, manager: Any) -> bool:
        """Whether the newest checkpoint is the last of a run that came to its end, for rank 0."""

        def find() -> bool:
            with contextlib.suppress(CorruptionError):
                return manager.finished
            return False  # the log cannot be read at all: its writer rebuilds it

        return find() if self._group is None else told(self._group, find)

    def changed_line(self, before: int) -> str:
        """What to say if a checkpoint is from another number of ranks; "" if not."""
        now = 1 if self._group is None else self._group.ranks.size
        if before == now:
            return ""
        return f"saved by {plural(before, 'rank')}, goes on with {now}"

    def bucket_orders(self, tracked: Mapping[str, Any]) -> dict[str, Any]:
        """For a checkpoint: in which order gradients of ranks are summed, by framework and model.
        All ranks ask."""
        if self._group is None:
            return {}
        return {one.name: one.bucket_orders(tracked) for one in _with_buckets()}

    def put_bucket_orders(self, tracked: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
        """Before the first step: make it what `bucket_orders` has found. All ranks call this."""
        if self._group is None:
            return
        for adapter in _with_buckets():
            orders = saved.get(adapter.name, {})
            for name, why in adapter.put_bucket_orders(tracked, orders, self._group).items():
                self._console.say(order_line(name, why))

    def settle(self, manager: Any) -> None:
        """All ranks have come to the end, and all know it: nothing is kept for them."""
        if self._group is not None:
            self._group.gather(None)
            manager.settle()


def _with_buckets() -> list[Any]:
    return [one for one in frameworks.loaded_adapters() if hasattr(one, "bucket_orders")]
