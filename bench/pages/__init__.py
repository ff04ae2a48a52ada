"""Generate the parts of the documentation that repeat code or tables.

    python -m bench.pages            # rewrite docs/ and README.md where they are stale
    python -m bench.pages --check    # list stale files, change nothing; 1 when there are any

A page holds blocks `<!-- block NAME -->` ... `<!-- end -->`; the text between the two lines comes
from the function of that name. The picture of the tiles is a file of its own.
"""
