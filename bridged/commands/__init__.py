"""The commands of the command line that are more than a few lines. Each module has `add_arguments` and `main`."""
