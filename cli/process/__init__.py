"""Wires the processes of production together: a server, an engine, and a supervisor of engines."""
