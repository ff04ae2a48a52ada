"""Notice ranks that are gone, stopped or behind, and end the others in time."""
