"""The only part of foldcp that imports Boltz: switch, features, swap and output."""
