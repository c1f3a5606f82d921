"""The seed's command lines (dsd, dsdsh) on the same functions."""
