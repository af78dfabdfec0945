"""An exhaustive model of the log-commit protocol; see docs/design/commit-protocol.md."""
