"""bridged: Braze Currents events to Mixpanel, acked when they are on disk."""

__version__ = "0.1.0"
