"""The parts of a conditional flow: each maps (z, context) one to one, with its log-determinant."""
