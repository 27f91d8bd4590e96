"""The calls and layouts of other engines, by their own names."""
