"""Notice ranks that have ended, stopped or fallen behind, and end the others in time."""
