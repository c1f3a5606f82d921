"""opustomo: structural heterogeneity of macromolecules from cryo-electron tomography."""

__version__ = "0.1.0"
