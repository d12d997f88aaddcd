"""What the simulated scene is made of, and what a map of it has to beat."""
