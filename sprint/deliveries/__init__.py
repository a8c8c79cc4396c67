"""How records reach subscribers: each module reads the ring and keeps its own accounts by tier."""
