"""Braze as the writer of cohorts knows it: where it is, what is sent, what its answers mean. Pure but for the transport."""
