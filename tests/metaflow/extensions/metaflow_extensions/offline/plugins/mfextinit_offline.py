"""An extension of Metaflow for tests: `--environment=conda` without packages to download."""

ENVIRONMENTS_DESC = [("conda", ".environment.OfflineEnvironment")]
