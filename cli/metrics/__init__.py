"""What each process says when Prometheus asks, and the listener that answers."""
