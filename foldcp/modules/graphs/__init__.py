"""Record blocks and sampling steps as CUDA graphs and replay them."""
