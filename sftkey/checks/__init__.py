"""The gate: all that is wrong with a recipe and its rows, found before a weight is loaded."""
