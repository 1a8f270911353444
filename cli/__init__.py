"""The composition root: reads settings, wires the processes together, and talks to the operator."""
