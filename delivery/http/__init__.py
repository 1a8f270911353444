"""Guarded HTTPS requests to receivers. Start at connector."""
