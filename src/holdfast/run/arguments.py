"""Arguments of `Run` that are checked, or become others, before anything is done."""

from __future__ import annotations

from collections.abc import Mapping

from holdfast.core.retention import KeepPolicy, parse_keep
from holdfast.core.schedule import Schedule, parse_every
from holdfast.errors import BadPolicy, UsageError


def final_policy(text: str, policy: KeepPolicy) -> str:
    """`on_finish=` as a retention policy: "final" is the last checkpoint, and `best=1`
    without a metric the one that `keep` names.

    >>> final_policy("final best=1", parse_keep("last=3 best=2:val_loss"))
    'last=1 best=1:val_loss:min'
    """
    words: list[str] = []
    for word in text.split():
        if word == "final":
            words.append("last=1")
        elif word.startswith("best=") and ":" not in word:
            if not policy.best:
                raise BadPolicy(
                    f"on_finish={text!r}: {word} names no metric, and neither does keep",
                    hint=f"Write {word}:val_loss, or add best=1:val_loss to keep.",
                )
            words.append(f"{word}:{policy.best[0].metric}:{policy.best[0].mode}")
        else:
            words.append(word)
    result = " ".join(words)
    if parse_keep(result).empty:
        raise BadPolicy(f"on_finish={text!r} has no rule", hint='Write on_finish="final".')
    return result


def check_rename(rename: Mapping[str, str]) -> None:
    """Names that change places would do so again at each start."""
    for first in rename:
        name, steps = rename[first], 1
        while name in rename and name != first and steps < len(rename):
            name, steps = rename[name], steps + 1
        if name == first != rename[first]:
            raise UsageError(
                f"rename={dict(rename)!r} comes back to {first!r}, and would be done again "
                "at every start",
                hint="Use names that were never saved. To swap two, give both a new one.",
            )


def whole(n: int, what: str) -> int:
    if isinstance(n, bool) or not hasattr(n, "__index__") or n.__index__() < 0:
        raise UsageError(
            f"{what} needs a whole number of at least 0, not {n!r}",
            hint=f"run.{what}(20), or run.{what}(None) to go on without end.",
        )
    return n.__index__()


def exit_status(code: int) -> int:
    """0 would say that the run is complete, and nobody would start it again."""
    if isinstance(code, bool) or not isinstance(code, int) or not 1 <= code <= 255:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(
            f"exit_code={code!r} is no status of a process that has more to do",
            hint="Give a number from 1 to 255; 75 says: run me again.",
        )
    return code


def hold_schedule(hold: bool | int | str | None) -> Schedule | None:
    """`hold=` as a schedule; True is each boundary.

    >>> str(hold_schedule(True)), str(hold_schedule("1min"))
    ('1 epoch', '1min')
    """
    if hold is None or hold is False:
        return None
    if hold is True:
        return Schedule(steps=1, epoch=True)
    hint = 'hold=True (each step), hold=500 (steps), hold="1min", hold="epoch".'
    if "auto" in str(hold):
        raise BadPolicy(f"hold={hold!r} is no interval", hint=hint)
    try:
        return parse_every(hold)
    except BadPolicy as error:
        raise BadPolicy(error.message.replace("every=", "hold=", 1), hint=hint) from None
