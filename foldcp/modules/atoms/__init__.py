"""Run atom attention on windows of atoms, one block of windows per rank."""
