"""The work of the operator's commands, each in a module of its name. Start at verify."""
