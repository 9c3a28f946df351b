"""What the training stages share: corpora, the fused loss, the optimiser loop, exact resume."""
