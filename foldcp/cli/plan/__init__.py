"""Say how a cluster would fold an input, before anything is folded."""
