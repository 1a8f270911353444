"""Connections to PostgreSQL: how they are made, pooled and planned for. Start at pool."""
