"""The card of a task: what it says, when it is written, and that nobody waits for it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from holdfast.core.units import format_size
from holdfast.errors import Fenced, StoreUnavailable, UnsupportedValue
from holdfast.manager.listing import Listing
from holdfast.manager.pending import Pending
from holdfast.metaflow.card import Card
from holdfast.metaflow.card_chart import Point
from holdfast.metaflow.card_page import Row, Start, Story, page
from holdfast.metaflow.checkpoints import Checkpoints
from holdfast.metaflow.current import CurrentCheckpoint
from tests.metaflow.tasks import task, written

_EMPTY = {"meta", "br"}


class Reader(HTMLParser):
    """Raises for a page that is not well formed, or that would fetch something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "i", "link", "img", "iframe", "a")
        names = {name for name, _ in attrs}
        assert not names & {"src", "href", "style"}
        assert not any(name.startswith("on") for name in names)
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            assert "url(" not in data
            assert "@import" not in data
        else:
            self.text += data


def test_the_page_escapes_all_that_it_is_given() -> None:
    hostile = "<i>&\"'</i><script src=//x></script>"
    row = Row(3, hostile, 1, 5.0, 10, 5, None, {hostile: hostile}, (hostile,))
    points = [Point(float(i), i // 2, 10, 5, 1.0, {hostile: float(i)}) for i in range(4)]
    story = Story(
        pathspec=hostile,
        attempt=1,
        state="running",
        now_s=9.0,
        start=Start(hostile, hostile, 0, 10, 0.1),
        passed_over=(hostile,) * 9,
        failures=(hostile,) * 9,
        points=points,
        rows=[row],
        url=hostile,
        keep=hostile,
    )
    text = Reader(page(story)).text
    assert text.count(hostile) >= 14  # in each of the places above, lists being cut
    assert text.count("and 4 more") == 2


def test_the_page_of_a_task_that_has_done_nothing() -> None:
    text = Reader(page(Story("Train/7/fit/2", 0, "failed", 9.0))).text
    assert "Nothing has been saved yet" in text
    assert "Began with nothing loaded" in text


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -1e308, 0.0])
def test_the_page_draws_any_number(odd: float) -> None:
    points = [Point(5.0, 0, 0, 0, None, {"loss": value}) for value in (odd, odd, 1e308)]
    html = page(Story("Train/7/fit/2", 0, "running", 9.0, points=points))
    Reader(html)
    drawing = html.partition("<svg")[2].partition("</section>")[0]
    assert "nan" not in drawing.replace("nan to", "").replace("last nan", "")
    assert 'd="MN' not in drawing
    assert "inf" not in drawing


def test_a_page_of_a_thousand_saves_is_small() -> None:
    points = [Point(float(i), 0, i, i, 0.5, {"loss": 1 / (i + 1)}) for i in range(1000)]
    row = Row(1, "mfchckpt", 0, 5.0, 10, 5, 0.5, {"epoch": 1, "note": "long " * 1000})
    html = page(
        Story("Train/7/fit/2", 0, "running", 9.0, points=points, rows=[row] * 1000, kept=1000)
    )
    assert len(html) < 40_000
    assert "and 950 that are older" in Reader(html).text


class Pages:
    """What a card has written, and what it was told before it could."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self.stuck = threading.Event()
        """Clear: the store does not answer."""
        self.stuck.set()
        self.error: Exception | None = None

    def write(self, html: str) -> None:
        self.stuck.wait()
        if self.error is not None:
            raise self.error
        self.all.append(html)

    @property
    def last(self) -> str:
        return Reader(self.all[-1]).text

    def card(self, interval_s: float = 0.0, attempt: int = 0, keep: str | None = None) -> Card:
        return Card(
            self.write,
            pathspec="Train/7/fit/2",
            attempt=attempt,
            keep=keep,
            interval_s=interval_s,
        )


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


def ended(card: Card) -> None:
    """The last page is written, however slow this machine is."""
    if (thread := card._thread) is not None:  # pyright: ignore[reportPrivateUsage]
        thread.join(30)
        assert not thread.is_alive()


def save(fit: Checkpoints, folder: Path, count: int, block: bool = True) -> None:
    for number in range(count):
        fit.save(
            written(folder, content=str(number)), metadata={"loss": 1 / (number + 1)}, block=block
        )


def test_what_happens_is_on_the_card(tmp_path: Path) -> None:
    """Of all attempts: one fails with its last save, the next one goes on from the one before."""
    pages = Pages()
    card = pages.card(keep="last=3 best=1:loss:max")
    fit = task(tmp_path / "ds", card=card, keep="last=3 best=1:loss:max")
    assert not any(thread.name == "holdfast-card" for thread in threading.enumerate())
    save(fit, tmp_path / "x", 5, block=False)
    fit.close()
    card.end(failed=True)
    ended(card)
    assert "failed attempt 0" in pages.last
    assert "saved in this attempt5" in pages.last
    assert "kept41 removed, keep=last=3 best=1:loss:max" in pages.last
    size = format_size(sum(each.size for each in task(tmp_path / "ds").list()))
    assert f"in the checkpoints{size}each" in pages.last
    assert "best:loss" in pages.last
    [run] = (tmp_path / "ds").rglob("main")
    with Listing(run) as listing:
        newest = listing.checkpoints()[-1]
    spoiled = run / "manifests" / f"{newest.id}.json"
    spoiled.chmod(0o644)
    spoiled.write_bytes(b"spoiled")

    card = pages.card(attempt=1)
    fit = task(tmp_path / "ds", card=card, attempt=1)
    current = CurrentCheckpoint(fit)
    current.go_on("fresh")
    current.save(written(tmp_path / "x", content="more"), metadata={"loss": 0.1})
    current.finish()
    card.end(failed=False)
    ended(card)
    assert "finished attempt 1" in pages.last
    assert "Damaged, and passed over" in pages.last
    assert "main@4, saved by Train/7/fit/2 in attempt 0" in pages.last
    assert pages.last.count("loaded, verified") == 1
    assert "holdfast restore" in pages.last
    assert "main@6 out" in pages.last
    assert "took" in pages.last
    assert pages.all[-1].count('class="attempt"') == 3  # in each track; the saves before are there
    assert not any(thread.name == "holdfast-card" for thread in threading.enumerate())


def test_many_saves_are_few_pages(tmp_path: Path) -> None:
    """One at once, and then one for each interval in which something happens."""
    pages = Pages()
    card = pages.card(interval_s=0.5)
    fit = task(tmp_path / "ds", card=card)
    begin = time.monotonic()
    save(fit, tmp_path / "x", 1)
    assert within(20, lambda: len(pages.all) == 1)
    save(fit, tmp_path / "x", 30)
    assert within(20, lambda: "saved in this attempt31" in pages.last)
    assert 2 <= len(pages.all) <= 2 + (time.monotonic() - begin) / 0.5

    def quiet() -> bool:
        before = len(pages.all)
        time.sleep(0.7)
        return len(pages.all) == before

    # Nothing happens; but of the last save the card may have heard while it drew it.
    assert within(20, quiet)
    count = len(pages.all)
    fit.close()
    card.end(failed=False)
    ended(card)
    assert len(pages.all) == count + 1


def test_nobody_waits_for_a_store_that_does_not_answer(tmp_path: Path) -> None:
    pages = Pages()
    pages.stuck.clear()
    card = pages.card()
    fit = task(tmp_path / "ds", card=card)
    save(fit, tmp_path / "x", 3)
    fit.close()
    assert not pages.all
    card.end(failed=False)
    start = time.monotonic()
    card.wait()
    assert 0.4 < time.monotonic() - start < 5.0
    pages.stuck.set()
    assert within(20, lambda: bool(pages.all) and "finished" in pages.last)


def test_a_card_that_cannot_be_written_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pages = Pages()
    pages.error = OSError("no such bucket")
    card = pages.card()
    fit = task(tmp_path / "ds", card=card)
    save(fit, tmp_path / "x", 1)
    assert within(20, lambda: "no such bucket" in caplog.text)
    save(fit, tmp_path / "x", 3)
    fit.close()
    card.end(failed=False)
    ended(card)
    assert len(fit.list()) == 4
    assert caplog.text.count("the card of Train/7/fit/2 could not be written") == 1


def test_a_save_that_fails_is_on_the_card(tmp_path: Path) -> None:
    pages = Pages()
    card = pages.card()
    fit = task(tmp_path / "ds", card=card)
    save(fit, tmp_path / "x", 1)
    fifo = tmp_path / "x" / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(UnsupportedValue):
        save(fit, tmp_path / "x", 1)
    fifo.unlink()
    pending = Pending(3)
    card.saving(pending)
    pending.failed(StoreUnavailable("the disk is full"))  # in the background
    fit.close()
    card.end(failed=False)
    ended(card)
    assert "Saves that failedsave 2: cannot save 'files/fifo'" in pages.last
    assert "save 3: the disk is full" in pages.last
    assert "saved in this attempt1" in pages.last


def test_an_attempt_that_was_given_up_leaves_the_card_alone(tmp_path: Path) -> None:
    pages = Pages()
    old_card = pages.card()
    old = task(tmp_path / "ds", card=old_card)
    save(old, tmp_path / "x", 1)
    card = pages.card(attempt=1)
    new = task(tmp_path / "ds", card=card, attempt=1)
    save(new, tmp_path / "x", 1)
    new.close()
    card.end(failed=False)
    ended(card)
    with pytest.raises(Fenced):
        save(old, tmp_path / "x", 1)
    old.close()
    old_card.end(failed=True)
    ended(old_card)
    assert "finished attempt 1" in pages.last


def test_a_forked_child_writes_no_card(tmp_path: Path) -> None:
    pages = Pages()
    card = pages.card()
    fit = task(tmp_path / "ds", card=card)
    save(fit, tmp_path / "x", 1)
    assert within(20, lambda: len(pages.all) == 1)
    silent = pages.card()  # of which no thread has begun
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)  # it must not stay for ever if it waits for the lock
        card._lock.acquire()  # pyright: ignore[reportPrivateUsage] - of a thread that is gone
        save(fit, tmp_path / "x", 1)
        fit.close()
        for each in (card, silent):
            each.end(failed=True)
        within(0.3, lambda: len(pages.all) > 1)
        os._exit(len(pages.all))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    fit.close()


def test_the_card_of_long_work_stays_small(tmp_path: Path) -> None:
    """In memory too: what is drawn is thinned out."""
    pages = Pages()
    card = pages.card(keep="last=5")
    fit = task(tmp_path / "ds", card=card, keep="last=5")
    save(fit, tmp_path / "x", 1)
    info = fit._open().checkpoints()[0]  # pyright: ignore[reportPrivateUsage]
    for number in range(5000):
        pending = Pending(number)
        pending.committed(replace(info, time_s=info.time_s + number))
        card.saving(pending)
    fit.close()
    card.end(failed=False)
    ended(card)
    assert len(card._points) <= 2000  # pyright: ignore[reportPrivateUsage]
    assert len(pages.all[-1]) < 40_000
    assert "saved in this attempt5,001" in pages.last
