"""What the commands for one machine do: everything at once, its demo, its tokens, a receiver."""
