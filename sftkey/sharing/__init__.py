"""What leaves a run folder: merged models, cards, uploads, exports to other programs."""
