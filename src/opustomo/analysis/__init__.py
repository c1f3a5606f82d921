"""After training: codes, volumes, quality, selection, plots and the report."""
