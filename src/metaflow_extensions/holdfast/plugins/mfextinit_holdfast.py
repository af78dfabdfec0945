"""What this extension adds to Metaflow. Read by every process that imports Metaflow."""

STEP_DECORATORS_DESC = [
    ("checkpoint", ".decorator.CheckpointDecorator"),
    ("model", ".models.ModelDecorator"),
]

CLIS_DESC = [("checkpoint", ".cli.cli")]
