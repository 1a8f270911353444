"""Guarded HTTPS requests to receivers. Start at client."""
