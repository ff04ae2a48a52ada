"""Join ranks to a mesh and move regions of tensors between them."""
