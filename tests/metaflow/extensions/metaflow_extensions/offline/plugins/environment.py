"""`@conda` and its arguments are taken, and the interpreter that runs is used."""

import sys

from metaflow.metaflow_environment import MetaflowEnvironment


class OfflineEnvironment(MetaflowEnvironment):
    TYPE = "conda"

    def __init__(self, flow):
        self.base_env = MetaflowEnvironment(flow)

    def set_local_root(self, root):
        pass

    def decospecs(self):
        return ("conda",)

    def executable(self, step_name, default=None):
        return sys.executable

    def interpreter(self, step_name):
        return sys.executable

    def is_disabled(self, step):
        return True

    def init_environment(self, echo, only_steps=None):
        pass

    def validate_environment(self, logger, datastore_type):
        pass

    def add_to_package(self):
        return []
