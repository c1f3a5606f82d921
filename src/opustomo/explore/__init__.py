"""A page that looks into runs: a small server for this machine alone, and what it serves."""
