"""How an engine shares its slots between webhook configs. Start at capacity."""
