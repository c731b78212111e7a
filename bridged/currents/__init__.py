"""What Braze sends. Pure."""
