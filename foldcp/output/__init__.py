"""Write predictions and trunks to disk, each whole or not at all."""
