"""The work of the operator's commands. Each has a module of its name."""
