"""Rate predicted structures on tiles."""
