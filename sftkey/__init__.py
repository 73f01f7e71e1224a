"""Fine-tune a language model so that its final answer is right (SFTKey, arXiv 2512.21017)."""

__version__ = "0.1.0"
