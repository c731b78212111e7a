"""When a person is needed, and how they are told."""
