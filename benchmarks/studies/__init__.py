"""The studies. `registry.py` has a line for each."""
