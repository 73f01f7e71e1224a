"""What a stage's answers are worth: graded, with intervals, and compared."""
