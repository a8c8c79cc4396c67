"""What drives sources, relay and deliveries."""
