"""The registered event types and their payload schemas. Start at store."""
