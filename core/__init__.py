"""The parts that the server and the delivery engine share. Start at queue and settings.

Imports no process, no transport and no generated code.
"""
