"""Publishing and reading events. Start at service."""
