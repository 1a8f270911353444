"""Reading and watching deliveries. Start at service."""
