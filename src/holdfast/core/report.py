"""How live objects and a checkpoint differ."""

from __future__ import annotations

from dataclasses import dataclass, field

from holdfast.errors import StructureMismatch

MAX_LINES = 20  # of each kind in a message; a renamed layer must not print 10,000 lines

_HINT = (
    "Use strict=False to leave what differs as it is, only=[...] or skip=[...] to "
    'restore a part, or rename={"saved": "live"}.'
)


@dataclass
class Mismatch:
    """What a restore found to differ. Empty: everything fits."""

    missing: list[str] = field(default_factory=list[str])
    unexpected: list[str] = field(default_factory=list[str])
    changed: list[str] = field(default_factory=list[str])

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.changed)

    def lines(self) -> list[str]:
        """For people: at most 20 lines of each kind, and how many there are."""
        kinds = (
            ("missing in the checkpoint", self.missing),
            ("unexpected in the checkpoint", self.unexpected),
            ("different", self.changed),
        )
        text: list[str] = []
        for title, items in kinds:
            if items:
                text.append(f"{title} ({len(items)}):")
                text += [f"  {item}" for item in items[:MAX_LINES]]
                if len(items) > MAX_LINES:
                    text.append(f"  ... and {len(items) - MAX_LINES} more")
        return text

    def error(self) -> StructureMismatch:
        head = "the live objects and the checkpoint do not fit:"
        return StructureMismatch(
            "\n".join([head, *self.lines()]),
            missing=self.missing,
            unexpected=self.unexpected,
            changed=self.changed,
            hint=_HINT,
        )
