"""Run the `foldcp` command."""
