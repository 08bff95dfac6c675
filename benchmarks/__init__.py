"""Measurements of the runtime; not part of the installed package."""
