"""Files and coordinates: scenes, the tile store, labels, maps, and the simulated scene."""
