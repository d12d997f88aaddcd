"""The file layouts of satellite products: each becomes a `Scene`."""
