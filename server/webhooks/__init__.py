"""Managing webhook configs. Start at service."""
