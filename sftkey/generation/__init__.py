"""Text from models, in batches."""
