"""The work of `postrider canary`. Begin with `check`, which lists the steps."""
