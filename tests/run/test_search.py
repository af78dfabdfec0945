"""What is looked at may change meanwhile."""

from __future__ import annotations

from holdfast.run.search import small_items


def test_a_dict_that_grows_while_it_is_looked_at() -> None:
    """As where another thread is at work on it."""
    grown: dict[object, int] = {}

    class Key:
        def __repr__(self) -> str:
            grown["more"] = 2
            return "key"

    grown[Key()] = 1
    grown["other"] = 0
    assert small_items(grown) == [("[key]", 1), ("['other']", 0)]
