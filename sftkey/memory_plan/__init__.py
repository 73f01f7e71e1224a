"""How much memory a recipe's stages take on a GPU, before anything is loaded."""
