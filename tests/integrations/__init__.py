"""Real trainers, which install with an extra of their own."""
