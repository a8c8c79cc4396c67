"""The HTTP face of Sprint."""
