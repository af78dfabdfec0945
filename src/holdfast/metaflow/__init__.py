"""Checkpoints inside the steps of Metaflow flows: what `from metaflow import checkpoint` does.

The package `metaflow_extensions.holdfast` beside this one is what Metaflow finds; it is imported
by every process that imports Metaflow, so it is thin and calls this one when a task starts.
"""
