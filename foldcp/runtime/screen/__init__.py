"""Show how far a run is, on a terminal and in a log."""
