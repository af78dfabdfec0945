"""The loop: a training program that goes on where it was killed."""

from holdfast.run.run import Run as Run

__all__ = ["Run"]
