"""`from metaflow import Checkpoint`."""

__mf_extensions__ = "holdfast"
__version__ = "0.1.0"


class Checkpoint:
    """
    The checkpoints of a task, in a process that the task has started.

    Parameters
    ----------
    temp_dir_root : str, optional
        Where `directory` is made.
    init_dir : bool, default False
        Whether to make it at once.
    """

    def __new__(cls, temp_dir_root=None, init_dir=False):
        from holdfast.metaflow.outside import checkpoint

        return checkpoint(temp_dir_root, init_dir)
