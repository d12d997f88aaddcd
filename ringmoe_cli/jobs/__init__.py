"""What the commands do: one call each, from what the user asks for to what is reported."""
