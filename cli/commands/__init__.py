"""The subcommands: their options, their help, and the settings that they read.

Their work is in the packages beside this one, under the same names. It is imported when a command
runs, so that `--help` and `health` start faster.
"""
