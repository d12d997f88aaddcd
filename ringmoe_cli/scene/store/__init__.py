"""Inside the tile store: layout on disk, chunks, regions, statistics, training chips."""
