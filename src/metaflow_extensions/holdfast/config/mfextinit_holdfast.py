"""Settings of Metaflow that this extension changes."""

# It imports this file when its own settings are there, and takes what is in it over those.
from metaflow import metaflow_config as _metaflow_config
from metaflow.metaflow_config_funcs import from_conf as _from_conf

# Unless a user has chosen: what Metaflow has, and ours.
SPIN_ALLOWED_DECORATORS = _from_conf(
    "SPIN_ALLOWED_DECORATORS",
    [*_metaflow_config.SPIN_ALLOWED_DECORATORS, "checkpoint", "model"],
)
