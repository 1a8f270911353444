"""Handling of one gRPC call: dispatch, authentication, status, audit, checks. See dispatch."""
