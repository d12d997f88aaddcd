"""Inside a map: windows in, rows out, parts that survive, vectors."""
