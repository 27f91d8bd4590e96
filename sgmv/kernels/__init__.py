"""Jitted code and nothing else. Arguments arrive checked, outputs are passed in."""
