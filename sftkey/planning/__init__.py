"""Before training: whether a recipe is right, what it needs, and recipes for new models."""
