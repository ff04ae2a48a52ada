"""Read, check and process the inputs of a prediction on the root rank."""
