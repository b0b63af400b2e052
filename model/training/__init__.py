"""Training an adapter."""
