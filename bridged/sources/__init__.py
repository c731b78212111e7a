"""The doors: framing, authentication and back-pressure, nothing else."""
