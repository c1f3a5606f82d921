"""``opustomo doctor``: can this machine run the program, and what to mend.  Knows nothing of data sets."""
