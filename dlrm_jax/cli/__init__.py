"""What the commands share: flags, how a command runs and ends, a run found again in its workdir."""
