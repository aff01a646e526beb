"""What the server survives, counted: hostile bodies, clients that are slow, dead or too many, and its own end."""
