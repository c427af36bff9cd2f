"""How good an aligner is: answers through the engine, judged, measured and calibrated."""
