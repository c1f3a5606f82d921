"""What the script ``train.py`` is made of: its beginning, its state, its watch and its verdict."""
