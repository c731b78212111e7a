"""Mixpanel cohorts, imported into Braze: what Mixpanel says, what Braze is known to have, and the difference."""
