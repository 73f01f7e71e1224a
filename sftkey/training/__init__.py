"""Training: the trainer of one stage, the run folder, and the stages one after another."""
