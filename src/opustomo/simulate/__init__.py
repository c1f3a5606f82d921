"""Simulated tilt series with known truth."""
