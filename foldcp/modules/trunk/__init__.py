"""Run the trunk on tiles: input embedding, MSA, templates, pairformer."""
