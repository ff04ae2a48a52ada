"""Stand in for the data module, the model loader and the writers that Boltz hands to Lightning."""
