"""Report a run and its predictions as one page that needs no network."""
