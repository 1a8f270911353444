"""The gRPC server: accepts events and manages webhook configs. Start at app."""
