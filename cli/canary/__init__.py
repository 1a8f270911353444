"""What `postrider canary` does: the check, the calls it makes, and the receiver it is called at."""
