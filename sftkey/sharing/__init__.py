"""What is handed on of a run."""
