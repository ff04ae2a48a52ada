"""The demo: stock Boltz and foldcp side by side on a machine without a GPU, `make demo`."""
