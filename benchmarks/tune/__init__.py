"""Tiles faster than the ladder's, searched around it with measurements and kept for the device."""
