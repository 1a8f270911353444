"""Who runs this command, for the audit log."""

import getpass
import os
import socket
from importlib.metadata import version

from core.operator_audit import Operator


def present_operator() -> Operator:
    """The user of this machine; in a container that knows no names, by number."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid-{os.getuid()}"
    return Operator(f"cli:{user}", socket.gethostname(), f"postrider/{version('postrider')}")
