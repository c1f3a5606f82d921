"""The network: encoder, decoder, pose corrector; plain arguments, never a config."""
