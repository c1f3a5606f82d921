"""Files in, one particle table out; and back."""
