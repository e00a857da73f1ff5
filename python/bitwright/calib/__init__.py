"""What calibration does: text to tokens, tokens through the blocks, activations to statistics."""
