"""Check what a user wrote, before Boltz's parser: every field, with its line, in the user's words.

Nothing here needs torch.
"""
