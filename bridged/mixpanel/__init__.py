"""What Mixpanel takes, and what its answers mean. Pure."""
