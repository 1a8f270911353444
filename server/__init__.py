"""The gRPC process: accepts events and serves webhook configs, deliveries and the admin calls."""
