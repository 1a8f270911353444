"""The work of `postrider canary`. Start at check, which lists the steps."""
