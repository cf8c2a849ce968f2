"""The process that the package runs in: its processors, memory, signals, forks and end."""
