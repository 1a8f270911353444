"""The subcommands: their options, their help, and the settings that they read.

What they do is in the packages beside this one, under the same names, and is imported when it is
called: what only asks for help or health starts faster.
"""
