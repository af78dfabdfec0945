"""The loop: a training program that goes on where it was killed."""
