"""The known event types and their payload schemas. Start at cache."""
