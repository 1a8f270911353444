"""What the operator's commands do, each in a module of its name."""
