"""Metaflow finds the card of a task, beside a user's own."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys

import pytest

from tests.metaflow.support import Metaflow

# As `get_cards` sees those of the newest run: by step, type and page.
_ASK = """
import json
from metaflow import Flow
from metaflow.cards import get_cards

found = []
for step in Flow("Carded").latest_run:
    try:
        cards = get_cards(step.task)
        found += [(step.id, card.type, len(cards), card.get()) for card in cards]
    except Exception as error:
        found.append((step.id, type(error).__name__, 0, ""))
print(json.dumps(found))
"""


def content(html: str) -> str:
    """What is in a card of Metaflow's own, which its scripts show."""
    [data] = re.findall(r'__MF_DATA__\["[\w-]+"\] = "([^"]+)"', html)
    return base64.b64decode(data).decode()


@pytest.mark.slow
def test_metaflow_finds_the_card(metaflow: Metaflow) -> None:
    metaflow.run("carded", "run")
    asked = subprocess.run(
        [sys.executable, "-c", _ASK],
        cwd=metaflow.folder,
        env=metaflow.environment(),
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = {(step, kind): (count, html) for step, kind, count, html in json.loads(asked)}
    assert set(found) == {
        ("start", "checkpoint"),
        ("middle", "CardNotPresentException"),
        ("end", "checkpoint"),
        ("end", "default"),
    }
    # One for both attempts, though they have changed their working directory.
    count, html = found["start", "checkpoint"]
    assert count == 1
    assert "finished</span> attempt 1" in html
    assert "in attempt 0" in html
    assert "&lt;i&gt;epoch&lt;/i&gt;" in html
    count, html = found["end", "checkpoint"]
    assert count == 2
    assert "finished" in html
    assert "saved in this attempt</dt><dd>1<" in html
    assert "of the user" in content(found["end", "default"][1])
    # Off is off.
    [middle] = metaflow.told
    assert middle == {"imported": False, "thread": False}

    # The commands ask no more than the step if it has one card, and the type if it has two.
    got = metaflow.run("carded", "card", "get", "start").output
    assert "finished</span> attempt 1" in got
    metaflow.run("carded", "card", "get", "end", "users.html", "--type", "default")
    assert "of the user" in content((metaflow.folder / "users.html").read_text())


# What a task of a flow with that datastore writes, and what Metaflow finds there.
_IN_A_BUCKET = """
import sys
from metaflow.datastore.flow_datastore import FlowDataStore
from metaflow.plugins.cards.card_datastore import CardDatastore
from metaflow.plugins.datastores.s3_storage import S3Storage
from holdfast.metaflow.card import card_of

datastore = FlowDataStore("Train", storage_impl=S3Storage, ds_root=sys.argv[1])
for attempt in range(2):
    card = card_of(datastore, pathspec="Train/7/fit/2", attempt=attempt, keep=None)
    card.end(failed=attempt == 0)
    card._thread.join()
cards = CardDatastore(datastore, pathspec="Train/7/fit/2")
[path] = cards.extract_card_paths(card_type="checkpoint")
print(cards.get_card_html(path))
"""


def test_metaflow_finds_the_card_in_a_bucket(metaflow_on_s3: Metaflow) -> None:
    root = metaflow_on_s3.datastore[1].partition("=")[2]
    found = subprocess.run(
        [sys.executable, "-c", _IN_A_BUCKET, root],
        cwd=metaflow_on_s3.folder,
        env=metaflow_on_s3.environment(),
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "finished</span> attempt 1" in found
