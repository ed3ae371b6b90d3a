"""One file per variant; the file's name is its `kind`. `contract.py` says what a variant must offer."""
