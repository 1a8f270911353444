"""What the server and the delivery engine share; imports neither of them, nor any transport."""
