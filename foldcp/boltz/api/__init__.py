"""Predict from Python: `foldcp.load(...).predict(...)`."""
