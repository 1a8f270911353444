"""Wires server, engine and the supervisor of engines. Start at server and delivery."""
