"""The calls of operators. Start at service."""
