"""`python -m foldcp`: the same as the `foldcp` command."""

from __future__ import annotations

from foldcp.cli.main import main

if __name__ == "__main__":
    main()
