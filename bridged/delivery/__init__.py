"""What leaves: the senders and their pace."""
