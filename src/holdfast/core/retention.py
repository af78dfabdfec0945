"""Which checkpoints stay: the `keep=` language, and its decision with reasons.

    last=N              the N newest, by commit
    best=K:metric:max   the K best by a logged metric (":min" is the default)
    every=N             the lowest step of each N steps (0..N-1, N..2N-1, …), for ever
    within=DUR          everything saved at most DUR before the newest commit
    size=200GB          a cap, applied last

A checkpoint stays if any rule wants it. No rules: everything stays. Rules:

1. Order is the order of the commits (`ordinal`), never the step, a clock or a file
   time: a run that went back to an earlier step goes on from there, and its newest
   checkpoints are those of the new line. A step that was saved twice is
   represented by its newest commit; the older one counts for no rule (but for
   `best` by its better value: the best weights are never given up because the same
   step came round again). Of each N steps `every=N` keeps the lowest.
2. The newest commit, pinned and tagged ones and those that a `best` rule wants are
   a floor: nothing removes them, `size=` included.
3. `size=` removes the oldest above the floor until the packs that are left fit,
   each pack counted once however many checkpoints share it. One whose removal
   would free nothing stays. Alone, it keeps everything that fits.
4. Deciding again about what was kept removes nothing more.
5. Metrics that are not finite never compete; of equal ones the earlier step wins.

Pure: what is removed, and when, is the caller's.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from holdfast.core.records import Record
from holdfast.core.units import exact_duration, exact_size, parse_duration, parse_size
from holdfast.errors import BadPolicy

Mode: TypeAlias = Literal["min", "max"]

GRAMMAR = "keep: last=N best=K:metric[:max|:min] every=N within=DUR size=200GB, separated by blanks"


class Best(NamedTuple):
    """Keep the `k` best by `metric`."""

    k: int
    metric: str
    mode: Mode

    def __str__(self) -> str:
        implied = split_metric(self.metric)[1] is None and not looks_higher_better(self.metric)
        return f"best={self.k}:{self.metric}" + (
            "" if self.mode == "min" and implied else f":{self.mode}"
        )


@dataclass(frozen=True)
class KeepPolicy:
    """A parsed `keep=`. `str()` gives a text that parses to the same policy."""

    last: int | None = None
    best: tuple[Best, ...] = ()
    every: int | None = None
    """Steps."""
    within_s: float | None = None
    size_bytes: int | None = None

    @property
    def empty(self) -> bool:
        """No rule at all: nothing is ever removed."""
        return not (self.last or self.best or self.every or self.within_s or self.size_bytes)

    @property
    def default_best(self) -> tuple[str, Mode] | None:
        """What `@best` means where no metric is named: the first `best` rule's."""
        return (self.best[0].metric, self.best[0].mode) if self.best else None

    def mode_of(self, metric: str) -> Mode | None:
        """The mode of the `best` rule about `metric`, if there is one."""
        return next((rule.mode for rule in self.best if rule.metric == metric), None)

    def __str__(self) -> str:
        words = [str(rule) for rule in self.best]
        if self.last is not None:
            words.insert(0, f"last={self.last}")
        if self.every is not None:
            words.append(f"every={self.every}")
        if self.within_s is not None:
            words.append(f"within={exact_duration(self.within_s)}")
        if self.size_bytes is not None:
            words.append(f"size={exact_size(self.size_bytes)}")
        return " ".join(words)


class Decision(NamedTuple):
    """What becomes of one checkpoint, and why."""

    record: Record
    keep: bool
    why: tuple[str, ...]
    """Kept: each rule that wants it ("last=3", "best=2:val_loss (0.231)", "tag gold").
    Else why none does ("no rule keeps it", "size: over 200GB", …). May hold tags
    and metric names as they were stored: escape them before a terminal sees them."""


# -- parsing ------------------------------------------------------------------


def parse_keep(text: str | None) -> KeepPolicy:
    """The policy that `text` writes down; None or "" has no rules and removes nothing.

    Raises BadPolicy, which shows the word that is wrong and the grammar.

    >>> parse_keep("last=3 best=2:acc:max").best
    (Best(k=2, metric='acc', mode='max'),)
    """
    if text is None:
        return KeepPolicy()
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise BadPolicy(f"keep={text!r} is a {type(text).__name__}, not text", hint=GRAMMAR)
    last: int | None = None
    every: int | None = None
    within_s: float | None = None
    size_bytes: int | None = None
    best: list[Best] = []
    seen: set[str] = set()
    for word in text.split():
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise _bad(text, word, "a rule is name=value")
        if name != "best" and name in seen:
            raise _bad(text, word, f"{name}= is given twice")
        seen.add(name)
        try:
            match name:
                case "last":
                    last = _count(value)
                case "every":
                    every = _count(value)
                case "within":
                    within_s = parse_duration(value)
                case "size":
                    size_bytes = parse_size(value)
                case "best":
                    best.append(_parse_best(value, best))
                case _:
                    raise ValueError(f"there is no rule {name!r}")
        except ValueError as error:
            raise _bad(text, word, str(error)) from None
    return KeepPolicy(last, tuple(best), every, within_s, size_bytes)


def _bad(text: str, word: str, reason: str) -> BadPolicy:
    return BadPolicy(f"cannot read {word!r} in keep={text!r}: {reason}", hint=GRAMMAR)


def _count(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", value) or int(value) == 0:
        raise ValueError(f"{value!r} is not a whole number above 0")
    return int(value)


def _parse_best(value: str, earlier: Sequence[Best]) -> Best:
    places, colon, rest = value.partition(":")
    if not colon or not rest:
        raise ValueError("it needs a number and a metric, like best=2:val_loss")
    k = _count(places)
    metric, mode = split_metric(rest)
    if mode is None:
        if looks_higher_better(metric):
            raise ValueError(
                f"say whether a higher or a lower {metric} is better: "
                f"best={k}:{metric}:max or best={k}:{metric}:min"
            )
        mode = "min"
    if any(rule.metric == metric for rule in earlier):
        raise ValueError(f"there are two best= rules for {metric!r}")
    return Best(k, metric, mode)


def split_metric(text: str) -> tuple[str, Mode | None]:
    """The metric and the mode that follows it, if one does. Raises ValueError.

    >>> split_metric("val_loss"), split_metric("acc:max")
    (('val_loss', None), ('acc', 'max'))
    """
    metric, _, mode = text.rpartition(":")
    if metric and mode == "min":
        return metric, "min"
    if metric and mode == "max":
        return metric, "max"
    if text.endswith(":"):
        raise ValueError(f"{text!r} ends in ':' (only :min or :max may follow a metric)")
    return text, None


# Words that decide nothing about a file but would delete the best weights if "min" were
# assumed for them. "score" is here because people use it both ways (FID is lower-better).
_HIGHER = re.compile(
    "acc|accuracy|top1|top5|f1|auc|auroc|auprc|ap|map|map50|bleu|rouge|meteor|r2|precision|recall"
    "|score|reward|returns?|psnr|ssim|iou|miou|dice|kappa|mcc|ndcg|mrr|elbo"
)
_LOWER = re.compile("loss|error|err|mse|mae|rmse|nll|perplexity|ppl|wer|cer|fid")


def looks_higher_better(metric: str) -> bool:
    """Whether `metric` may well be one where more is better, so that min is no safe guess.

    >>> looks_higher_better("val_acc"), looks_higher_better("val_loss")
    (True, False)
    """
    words = re.findall(r"[a-z]+[0-9]*", re.sub(r"([a-z])([A-Z])", r"\1 \2", metric).lower())
    return any(map(_HIGHER.fullmatch, words)) and not any(map(_LOWER.fullmatch, words))


# -- order --------------------------------------------------------------------


def ordered(records: Iterable[Record]) -> list[Record]:
    """`records` in the order of their commits, oldest first."""
    return sorted(records, key=lambda record: record.ordinal)


def _cost(value: float, mode: Mode) -> float:
    return value if mode == "min" else -value


def rank(record: Record, metric: str, mode: Mode) -> tuple[float, int, int] | None:
    """What sorts records by `metric`, best first; None for one that does not compete."""
    value = record.metrics.get(metric)
    if value is None or not math.isfinite(value):
        return None
    return _cost(value, mode), record.step, -record.ordinal


def ranking(records: Iterable[Record], metric: str, mode: Mode) -> list[Record]:
    """Those of `records` with a finite `metric`, best first, one per step.

    Equal values: the earlier step first. A step saved twice is represented by its
    better value, and by the newest commit among equal ones.
    """
    competing = [
        (key, record) for record in records if (key := rank(record, metric, mode)) is not None
    ]
    competing.sort(key=lambda item: item[0])
    steps: set[int] = set()
    best: list[Record] = []
    for _, record in competing:
        if record.step not in steps:
            steps.add(record.step)
            best.append(record)
    return best


class Leaders:
    """The best of some checkpoints by each rule of `best`, while more of them come.

    Ranks each checkpoint once, when it comes, among those in its places only.
    """

    def __init__(self, rules: Iterable[Best], records: Iterable[Record]) -> None:
        records = list(records)
        self._places = {rule: ranking(records, rule.metric, rule.mode)[: rule.k] for rule in rules}

    def add(self, record: Record) -> None:
        """One more checkpoint is there."""
        for rule, places in self._places.items():
            if rank(record, rule.metric, rule.mode) is not None:
                places[:] = ranking([*places, record], rule.metric, rule.mode)[: rule.k]

    def admit(self, metrics: Mapping[str, float]) -> bool:
        """Whether a new checkpoint with `metrics` would be among the best.

        Equal to the worst of K full places is not better: False.
        """
        for rule, places in self._places.items():
            value = metrics.get(rule.metric)
            if value is None or not math.isfinite(value):
                continue
            if len(places) < rule.k or _cost(value, rule.mode) < _cost(
                places[-1].metrics[rule.metric], rule.mode
            ):
                return True
        return False


# -- deciding -----------------------------------------------------------------


def decide(
    records: Sequence[Record], policy: KeepPolicy, *, damaged: Collection[str] = ()
) -> list[Decision]:
    """What `policy` does to a run's live checkpoints, oldest first.

    `damaged` are ids of checkpoints known not to be intact: they are left alone, and
    take nobody's place ("the newest three" are then the newest three intact ones).
    """
    run = ordered(records)
    if policy.empty:
        return [Decision(record, True, ("no rules: nothing is removed",)) for record in run]
    why: list[list[str]] = [[] for _ in run]
    intact = [i for i, record in enumerate(run) if record.id not in damaged]
    _apply_floor(run, intact, damaged, why)
    floor = {i for i, reasons in enumerate(why) if reasons}
    newest_of_step = {run[i].step: i for i in intact}
    representatives = sorted(newest_of_step.values())
    _apply_rules(run, representatives, policy, why)
    for rule in policy.best:
        floor.update(_apply_best(run, intact, rule, why))
    if policy.size_bytes is not None and policy == KeepPolicy(size_bytes=policy.size_bytes):
        for reasons in why:
            reasons.append(f"size={exact_size(policy.size_bytes)}")

    decisions = [
        Decision(record, True, tuple(reasons))
        if reasons
        else Decision(record, False, (_unwanted(record, newest_of_step, i),))
        for i, (record, reasons) in enumerate(zip(run, why, strict=True))
    ]
    if policy.size_bytes is not None:
        over = f"size: over {exact_size(policy.size_bytes)}"
        kept = [i for i, decision in enumerate(decisions) if decision.keep]
        for i in _over_size(run, kept, floor, policy.size_bytes):
            decisions[i] = Decision(run[i], False, (over,))
    return decisions


def wanted_by(records: Sequence[Record], policy: KeepPolicy) -> list[Record]:
    """Those that the rules of `policy` name themselves, oldest first: without the floor (rule 2)
    and `size=`."""
    run = ordered(records)
    why: list[list[str]] = [[] for _ in run]
    newest_of_step = {record.step: i for i, record in enumerate(run)}
    _apply_rules(run, sorted(newest_of_step.values()), policy, why)
    for rule in policy.best:
        _apply_best(run, range(len(run)), rule, why)
    return [record for record, reasons in zip(run, why, strict=True) if reasons]


def not_wanted(records: Sequence[Record], keep: KeepPolicy) -> list[str]:
    """Ids of those that `keep` gives up; none where it says nothing."""
    return [] if keep.empty else [d.record.id for d in decide(records, keep) if not d.keep]


def protected(
    records: Iterable[Record], rules: Iterable[Best] = (), *, damaged: Collection[str] = ()
) -> dict[str, tuple[str, ...]]:
    """Rule 2 alone: id -> why nothing removes it, of those on the floor.

    `damaged` ones are not the newest, nor the best.
    """
    run = ordered(records)
    intact = [i for i, record in enumerate(run) if record.id not in damaged]
    why: list[list[str]] = [[] for _ in run]
    _apply_floor(run, intact, (), why)
    for rule in rules:
        _apply_best(run, intact, rule, why)
    return {record.id: tuple(reasons) for record, reasons in zip(run, why, strict=True) if reasons}


def _apply_floor(
    run: Sequence[Record], intact: Sequence[int], damaged: Collection[str], why: list[list[str]]
) -> None:
    if intact:
        why[intact[-1]].append("newest")
    for record, reasons in zip(run, why, strict=True):
        reasons.extend("pinned" if not pin else f"pinned: {pin}" for pin in record.pins)
        reasons.extend(f"tag {tag}" for tag in record.tags)
        if record.id in damaged:
            reasons.append("damaged: no rule removes it")


def _apply_best(
    run: Sequence[Record], intact: Sequence[int], rule: Best, why: list[list[str]]
) -> list[int]:
    index = {run[i].id: i for i in intact}
    winners = [
        index[record.id]
        for record in ranking([run[i] for i in intact], rule.metric, rule.mode)[: rule.k]
    ]
    for i in winners:
        why[i].append(f"{rule} ({run[i].metrics[rule.metric]:.4g})")
    return winners


def _apply_rules(
    run: Sequence[Record], representatives: Sequence[int], policy: KeepPolicy, why: list[list[str]]
) -> None:
    """The rules that count one checkpoint per step; `representatives` are oldest first."""
    if not representatives:
        return
    if policy.last is not None:
        for i in representatives[-policy.last :]:
            why[i].append(f"last={policy.last}")
    if policy.every is not None:
        # By step: after going back, what is committed later can be the earlier step.
        lowest: dict[int, int] = {}
        for i in sorted(representatives, key=lambda i: run[i].step):
            lowest.setdefault(run[i].step // policy.every, i)
        for i in lowest.values():
            why[i].append(f"every={policy.every}")
    if policy.within_s is not None:
        newest = run[representatives[-1]]
        for i in representatives:
            if newest.time_s - run[i].time_s <= policy.within_s:
                why[i].append(f"within={exact_duration(policy.within_s)}")


def _unwanted(record: Record, newest_of_step: Mapping[int, int], index: int) -> str:
    if newest_of_step.get(record.step, index) != index:
        return f"step {record.step:,} was saved again"
    return "no rule keeps it"


def _over_size(
    run: Sequence[Record], kept: Sequence[int], floor: Collection[int], cap_bytes: int
) -> list[int]:
    """Which of `kept` must go so that the others' packs fit in `cap_bytes`."""
    sizes = {pack: nbytes for i in kept for pack, nbytes in run[i].packs.items()}
    users = Counter(pack for i in kept for pack in run[i].packs)
    total = sum(sizes.values())
    removed: list[int] = []
    for i in kept:
        if total <= cap_bytes:
            break
        if i in floor:
            continue
        removed.append(i)
        for pack in run[i].packs:
            users[pack] -= 1
            if users[pack] == 0:
                total -= sizes[pack]
    # Those that freed nothing, since others hold all their packs, need not go.
    return [i for i in removed if not all(users[pack] > 0 for pack in run[i].packs)]
