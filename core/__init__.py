"""The parts that the server and the delivery engine share. Start with `queue`, then `settings`.

Imports no process, no transport and no generated code.
"""
