"""`from metaflow import Checkpoint, load_model, delete_model`."""

__mf_extensions__ = "holdfast"
__version__ = "0.1.0"


class Checkpoint:
    """
    The checkpoints of a task, in a program that the task has started or in a step; in other
    processes, such as a notebook, those that tasks have saved, to list and to load.

    Parameters
    ----------
    temp_dir_root : str, optional
        Where `directory` is made.
    init_dir : bool, default False
        Whether to make it at once.
    """

    def __new__(cls, temp_dir_root=None, init_dir=False):
        from holdfast.metaflow.outside import Checkpoint

        return Checkpoint(temp_dir_root, init_dir)


def load_model(reference, path):
    """
    Load a model or a checkpoint into the folder `path`, in any process.

    Parameters
    ----------
    reference : dict or str
        What `current.model.save` or `current.checkpoint.save` returned, or its "key".
    path : str
        The folder, which is made if it is not there.
    """
    from holdfast.metaflow.outside import load_model

    load_model(reference, path)


def delete_model(reference):
    """
    Delete a model or a checkpoint, in any process.

    Parameters
    ----------
    reference : dict or str
        What `current.model.save` or `current.checkpoint.save` returned, or its "key".

    Returns
    -------
    bool
        Whether it was there.
    """
    from holdfast.metaflow.outside import delete_model

    return delete_model(reference)
