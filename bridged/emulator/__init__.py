"""A Mixpanel on loopback for the demo, the tests and the bench."""
