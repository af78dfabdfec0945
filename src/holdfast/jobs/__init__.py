"""The place that a job runs in: what of it would lose work, and job files that do not."""
