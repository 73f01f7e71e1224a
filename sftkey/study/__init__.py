"""Arms times seeds over recipes, and what they show."""
