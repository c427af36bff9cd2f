"""Training an aligner: the residual-alignment objective, the data and the loop."""
