"""Say who holds which part of a tensor and who sends what to whom: integers only, no torch."""
