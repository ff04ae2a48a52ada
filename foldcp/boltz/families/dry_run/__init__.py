"""Run the real code of a prediction on shapes: what it would hold, with no GPU and no peers."""
