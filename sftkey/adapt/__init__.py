"""A recipe for another model or other data, with its masks proven."""
