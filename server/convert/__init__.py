"""The only place where a row becomes a message or a message a domain value.

Columns are `*_at`, message fields `*_time`; ids get their prefixes here.
"""
