"""The subcommands: options, help and settings. Start at process and ops.

Their work is in the packages beside this one, under the same names. It is imported when a command
runs, so that `--help` and `health` start faster.
"""
