"""Write predictions, trunks and reports to disk, each whole or not at all, and read results."""
