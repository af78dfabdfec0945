"""The checkpoint that a process goes on from, and what it puts back into tracked objects."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from holdfast.core.frameworks import loaded_adapters
from holdfast.errors import LoopError, StructureMismatch
from holdfast.run import position as at
from holdfast.run.attributes import Attributes
from holdfast.run.constructed import Constructed
from holdfast.run.settings import Settings
from holdfast.run.tracking import Tracked


class Restores:
    """Restores what is tracked: at the start, where the way back ends, and late."""

    def __init__(
        self,
        manager: Any,
        tracked: Tracked,
        settings: Settings,
        constructed: Constructed,
        attributes: Attributes,
    ) -> None:
        self._manager = manager
        self._tracked = tracked
        self._settings = settings
        self._constructed = constructed
        self._attributes = attributes
        self.resumed: Any | None = None
        """The checkpoint that was restored."""
        self.names: Collection[str] = ()
        """In that checkpoint."""
        self._loaders: Collection[str] = ()
        self._settings_saved: Mapping[str, Any] = {}
        self._partial = False
        """It was imported: what it has not starts as it is."""

    def remember(self, found: Any) -> None:
        """`found` is the checkpoint to go on from. Raises LoopError if no Run saved it."""
        if found.loop is None:
            raise LoopError(
                f"{self._manager.address} was written by CheckpointManager: it has no place in a "
                "loop from which a Run could go on",
                hint="Go on with CheckpointManager, or give the Run an address of its own.",
            )
        self._partial = at.from_tree(found.loop).untouched  # raises too
        self.resumed = found.info
        self.names = found.loop["names"]
        self._loaders = found.loop["loaders"]

    def check_claimed(self) -> None:
        """Raises StructureMismatch for names in the checkpoint that nothing tracks."""
        self._tracked.check_claimed(self.names, self._manager.address)

    def check_settings(self, saved: Mapping[str, Any]) -> list[str]:
        """Raises ConfigChanged if tracked objects were built with other settings than `saved`;
        returns those that `override` allows."""
        self._settings_saved = saved
        return self._constructed.check(
            loaded_adapters(),
            self._tracked.objects,
            saved,
            self._manager.address,
            rename=self._rename(),
        )

    def everything(self, ref: str | None, *, rng: bool = True) -> Any:
        """Restore all that is tracked, with the random states if `rng`."""
        targets = self._tracked.targets(self.names, self._loaders)
        if self._partial:
            here = self._tracked.saved_here(self.names)
            targets = {name: value for name, value in targets.items() if name in here}
        try:
            restored = self._manager.restore(
                targets,
                ref,
                strict=self._settings.strict,
                only=tuple(targets),
                skip=() if targets else sorted(self._tracked.saved_here(self.names)),
                rename=self._rename(),
                allow_pickle=self._settings.allow_pickle,
                rng=rng,
            )
        except StructureMismatch as error:
            error.hint = self._tracked.advice(self.names)
            raise
        self._tracked.adopt(targets)
        self._constructed.put(loaded_adapters(), targets)
        self._attributes.load(restored.loop.get("attributes", {}), self._settings.rename or {})
        self._attributes.put(loaded_adapters(), targets)
        return restored

    def _rename(self) -> dict[str, str]:
        return self._tracked.renames_in(self.names, self._loaders)

    def late(self, names: Collection[str]) -> tuple[list[str], list[str]]:
        """Give objects that were tracked after the start what the checkpoint holds of them.

        Returns, in words, what they were built with otherwise than those that were saved:
        what is overridden, and what is as saved again. That is not refused: what is built in
        the middle of a run may depend on how it goes.
        """
        late = {name: self._tracked.objects[name] for name in names}
        different = self._constructed.compare(
            loaded_adapters(), late, self._settings_saved, rename=self._rename()
        )
        if self.resumed is None:
            return different
        targets = self._tracked.targets(self.names, self._loaders)
        targets = {name: value for name, value in targets.items() if name in names}
        if targets:
            self._manager.restore(
                targets,
                self.resumed.id,
                strict=self._settings.strict,
                only=tuple(targets),
                rename=self._rename(),
                allow_pickle=self._settings.allow_pickle,
                rng=False,
            )
            self._tracked.adopt(targets)
            self._constructed.put(loaded_adapters(), targets)
            self._attributes.put(loaded_adapters(), targets)
        return different
