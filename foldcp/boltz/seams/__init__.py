"""Name the functions of Boltz that foldcp replaces or relies on, and recognise their bodies."""
