"""Development on one machine: `run`, `demo`, `token`, `listen`. Start at run.

Only `cli.commands` imports this package, when a command runs. The production image does not carry
it. The extra `dev` installs its dependencies.
"""
