"""Run atom attention on windows of atoms, one shard of windows per rank."""
