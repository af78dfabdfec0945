"""Whether this process is about to be stopped: signals, and what the machine's owner says."""
