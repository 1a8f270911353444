"""Credentials and limits of callers: tokens, keys, certificates. Start at principal."""
