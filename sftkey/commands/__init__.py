"""The command line's commands: alone here something is printed, or a process ended."""
