"""What this extension adds to Metaflow. Read by every process that imports Metaflow."""

STEP_DECORATORS_DESC = [("checkpoint", ".decorator.CheckpointDecorator")]

CLIS_DESC = [("checkpoint", ".cli.cli")]
