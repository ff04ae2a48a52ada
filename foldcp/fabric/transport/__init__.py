"""Carry the messages of one rank to the others: wire format, programs and carriers."""
