"""Sample coordinates: conditioning, score model, sampler, steering."""
