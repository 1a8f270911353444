"""The user that runs a command, for the audit log."""

import getpass
import os
import socket
from importlib.metadata import version

from core.operator_audit import Operator


def present_operator() -> Operator:
    """Return the user of this machine. In a container without user names it is a number."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid-{os.getuid()}"
    return Operator(f"cli:{user}", socket.gethostname(), f"postrider/{version('postrider')}")
