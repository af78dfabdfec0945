"""Names that `from metaflow import …` finds."""

toplevel = "toplevel"
