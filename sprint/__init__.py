"""Bitcoin Sprint hears of a new Bitcoin block first, proves it, and relays it to every subscriber."""

__version__ = "0.1.0"
