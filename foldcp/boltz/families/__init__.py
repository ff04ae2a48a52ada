"""Put tiled modules into a loaded Boltz-1 or Boltz-2, and load their weights."""
