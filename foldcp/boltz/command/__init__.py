"""Check a `boltz predict` command before anything is loaded, and run it on all ranks."""
