"""What the commands share: flags and their help, how a command runs and ends."""
