"""The command line of `cft`."""
