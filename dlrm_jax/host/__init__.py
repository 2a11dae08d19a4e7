"""The machine: its processes, memory, files and devices, and what differs by platform."""
