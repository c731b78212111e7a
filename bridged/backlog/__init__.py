"""What waits: segments in a SQLite spool, the oldest of them in memory."""
