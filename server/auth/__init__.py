"""Who may call: tokens, key sets, client certificates and rate limits. Start at principal."""
