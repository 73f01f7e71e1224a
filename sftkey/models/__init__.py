"""Models, tokenizers and adapters: found, loaded, saved, merged."""
