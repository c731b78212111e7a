"""What an operator sees: metrics, health, the JSON API."""
