"""From rows of a source to the batches that a stage trains on."""
