"""Settings of Metaflow that this extension changes."""

from metaflow.metaflow_config_funcs import from_conf as _from_conf

# As Metaflow has them, and ours.
SPIN_ALLOWED_DECORATORS = _from_conf(
    "SPIN_ALLOWED_DECORATORS",
    [
        "conda",
        "pypi",
        "conda_base",
        "pypi_base",
        "environment",
        "project",
        "timeout",
        "conda_env_internal",
        "card",
        "checkpoint",
    ],
)
