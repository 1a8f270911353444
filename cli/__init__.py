"""The command `postrider`: reads settings and wires the processes. Start at main."""
