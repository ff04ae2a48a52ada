"""Say what this machine can do, what it lacks, and what to do about it."""
