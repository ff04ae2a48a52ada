"""Choose, check, chunk and compile: what all ops share."""
