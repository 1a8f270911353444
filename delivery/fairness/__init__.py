"""Limits between webhook configs: slots, rates, breakers. Start at concurrency."""
