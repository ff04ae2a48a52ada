"""Check file names, lock folders and explain why a file cannot be written."""
