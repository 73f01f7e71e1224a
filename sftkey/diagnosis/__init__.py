"""What limits a model's answers: its thinking, its answer, or neither."""
